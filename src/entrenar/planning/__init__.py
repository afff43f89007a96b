"""Planning memory: what a run will hold, and what it gives up to fit."""
