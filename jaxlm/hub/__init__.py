"""Checkpoints in the formats of Hugging Face.

convert       two-way conversion tables: import, export, and reports of missing and unexpected tensors
safetensors   reading and writing folders of safetensors files
model_files   reading the small files of a model's folder
peft          adapters in the format of PEFT
pooling       the embedding settings of sentence-transformers
gguf          files of llama.cpp, read and written
quantization  detection of quantised checkpoints, which are refused
place         loading of tensors onto devices, shard by shard
download      downloads from the Hugging Face hub
"""
