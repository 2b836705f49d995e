"""Kernels in CUDA C++ for Hopper, compiled at run time by NVRTC: the collapsed linear of 4-bit weights."""
