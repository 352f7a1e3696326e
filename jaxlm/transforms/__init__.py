"""Transformations of a model's parameters.

layers      models with some layers of a larger one
low_rank    addition of low-rank updates to projections (LoRA)
vocabulary  resized vocabularies
"""
