"""Layers built of the operations: adapted and quantized linears, embeddings, experts, and residual blocks."""
