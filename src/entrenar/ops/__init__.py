"""One kernel per file, on flat tensors; plain PyTorch, exact and readable, on any device."""
