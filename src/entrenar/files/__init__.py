"""Containers, reader and writer side by side: safetensors, GGUF, PEFT adapter directory, JSON lines."""
