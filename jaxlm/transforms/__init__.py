"""Transformations of a model's parameters.

adapters          low-rank updates of projections (LoRA): added, trained, merged, removed
calibration       statistics of the inputs of projections: second moments
calibration_rows  rows of texts, or token ids, for calibration
input_scales      scales of the inputs of projections that are rounded to 8 bits
influence         the influence of each layer on the hidden states
layers            models with some layers of a larger one
lengthening       models for long documents: more positions, local attention
masks             selection of the weights that pruning removes
pruning           pruning after training
quantization      quantisation to 8 or 4 bits: nearest values, GPTQ
sparsegpt         SparseGPT, a method of pruning
structured        smaller models: fewer layers, heads, MLP columns
vocabulary        resized vocabularies
"""
