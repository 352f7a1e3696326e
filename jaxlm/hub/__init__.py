"""Checkpoints from outside: files of a model folder, safetensors, and the two-way tables that convert its tensors."""
