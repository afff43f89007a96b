"""What is GGUF's: reader and writer, model families, keys, RoPE, tokenizers and vocabularies, and its types."""
