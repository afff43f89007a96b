"""Errors, strict YAML config, atomic writes, run log, memory readings. Imports neither torch nor transformers."""
