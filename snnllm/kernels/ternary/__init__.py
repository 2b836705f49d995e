"""Kernels in Triton of linears with ternary weights."""
