"""Kernels in Triton of attention over the encoded KV cache (those in C: `snnllm.kernels.cpu.attention`)."""
