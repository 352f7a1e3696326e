"""Transformations of a model's parameters.

calibration       second moments of the inputs of projections
calibration_rows  rows of texts, or token ids, for calibration
low_rank          addition of low-rank updates to projections (LoRA)
masks             selection of the weights that pruning removes
pruning           pruning after training
sparsegpt         SparseGPT, a method of pruning
vocabulary        resized vocabularies
"""
