"""Transformations of a model's parameters.

calibration       second moments of the inputs of projections
calibration_rows  rows of texts, or token ids, for calibration
low_rank          addition of low-rank updates to projections (LoRA)
vocabulary        resized vocabularies
"""
