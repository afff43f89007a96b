"""Rows → token ids and loss mask, splits, batches."""
