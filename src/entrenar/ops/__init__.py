"""Operations: each has a schema, a PyTorch reference, a native CPU kernel, and where it pays a Triton kernel.

registration.py says how one is registered; gpu_kernels.py when a Triton kernel serves; blocks.py and scales.py are what
block formats share. attention.py and the folders hold the operations.
"""
