"""The one training loop, its objective, checkpoints and stop signals."""
