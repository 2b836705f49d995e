"""Kernels for the CPU: C, compiled at first use by the system compiler, called through ctypes."""
