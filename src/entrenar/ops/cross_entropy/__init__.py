"""Cross-entropy of rows of logits, with its gradient."""
