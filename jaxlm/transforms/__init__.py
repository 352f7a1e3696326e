"""Transformations of a model's parameters.

calibration       second moments of the inputs of projections
calibration_rows  rows of texts, or token ids, for calibration
low_rank          addition of low-rank updates to projections (LoRA)
quantization      quantisation to 8 or 4 bits: nearest values, GPTQ
vocabulary        resized vocabularies
"""
