"""Conversion pipelines: how the masks and the integer weights of a spiking LLaMA are found."""
