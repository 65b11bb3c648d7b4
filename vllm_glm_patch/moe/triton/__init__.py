"""The Triton kernels of the fused MoE, one step a file."""
