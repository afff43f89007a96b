"""Norms, rotations and gated activations."""
