"""Measure a model: perplexity, exact match, KL divergence; generate text."""
