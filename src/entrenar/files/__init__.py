"""Containers, reader and writer side by side: safetensors, PEFT's adapter directories, JSON lines; and checkpoints that
come quantized (`prequantized`), whoever quantized them."""
