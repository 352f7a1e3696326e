"""Checkpoints from outside: the safetensors file format, and the two-way tables that rename and lay out its tensors."""
