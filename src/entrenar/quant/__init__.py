"""Number formats: codebooks, block formats, QuantizedTensor, QuantizedLinear, one registry."""
