"""4-bit codes into a codebook: quantizing, searching for better scales, dequantizing."""
