"""Transformations of a model's parameters.

adapters    low-rank updates of projections (LoRA): added, trained, merged, removed
vocabulary  resized vocabularies
"""
