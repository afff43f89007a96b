"""What makes models fast: faster forwards that are tried on the model at hand, not looked up by its name."""
