"""Transformations of a model's parameters.

adapters          low-rank updates of projections (LoRA): added, trained, merged, removed
calibration       second moments of the inputs of projections
calibration_rows  rows of texts, or token ids, for calibration
masks             selection of the weights that pruning removes
pruning           pruning after training
sparsegpt         SparseGPT, a method of pruning
vocabulary        resized vocabularies
"""
