"""GGUF's blocks: quantizing and dequantizing rows."""
