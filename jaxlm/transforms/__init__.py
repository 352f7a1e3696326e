"""Transformations of a model's parameters.

adapters          low-rank updates of projections (LoRA): added, trained, merged, removed
calibration       second moments of the inputs of projections
calibration_rows  rows of texts, or token ids, for calibration
influence         the influence of each layer on the hidden states
layers            models with some layers of a larger one
masks             selection of the weights that pruning removes
pruning           pruning after training
quantization      quantisation to 8 or 4 bits: nearest values, GPTQ
sparsegpt         SparseGPT, a method of pruning
structured        smaller models: fewer layers, heads, MLP columns
vocabulary        resized vocabularies
"""
