"""Kernels in Triton: the collapsed linear, what runs in front of it, and the inner loops of GPTQ."""
