"""Transformations of a model's parameters.

low_rank    addition of low-rank updates to projections (LoRA)
vocabulary  resized vocabularies
"""
