"""Opening a model: what a path holds, which parameter a stored tensor is, loading it and its adapter."""
