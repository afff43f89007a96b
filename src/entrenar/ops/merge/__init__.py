"""What merge methods compute over pieces of tensors."""
