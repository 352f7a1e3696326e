"""Transformations of a model's parameters.

adapters          low-rank updates of projections (LoRA): added, trained, merged, removed
calibration       second moments of the inputs of projections
calibration_rows  rows of texts, or token ids, for calibration
layers            models with some layers of a larger one
quantization      quantisation to 8 or 4 bits: nearest values, GPTQ
vocabulary        resized vocabularies
"""
