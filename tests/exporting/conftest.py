"""The tiny model as a GGUF that the gguf package wrote."""

from gguf_files import make_gguf

__all__ = ["make_gguf"]
