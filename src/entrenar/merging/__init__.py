"""Merge methods, mergekit's configs, and the executor that streams models through them chunk by chunk."""
