"""Load any transformers causal language model, quantized as it is read; GGUF names and tokenizers."""
