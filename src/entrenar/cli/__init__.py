"""The `entrenar` command: one file per verb; each parses, calls one recipe and prints."""
