"""Adapter layers: LoRA over a float base, QLoRA over a quantized one; attach, save, load."""
