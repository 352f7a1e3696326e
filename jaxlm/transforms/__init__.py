"""Transformations of a model's parameters.

low_rank    low-rank updates of frozen matrices (LoRA)
masked      arrays with some entries fixed at zero
quantized   8-bit arrays
vocabulary  resized vocabularies
"""
