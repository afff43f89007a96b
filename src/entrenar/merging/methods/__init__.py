"""The merge methods, one function each; `merging/registry.py` has a row for every one."""
