"""Write a fine-tuned model for another tool: fused Hugging Face directory, GGUF."""
