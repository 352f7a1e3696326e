"""Checkpoints from outside.

convert       two-way tables of the names of tensors: import, export, and the report of what does not fit
safetensors   folders of safetensors files
model_files   small files of a model's folder
pooling       how sentence-transformers' files declare embeddings
quantization  quantised checkpoints, which are refused by name
place         tensors of files to the shards that need them
download      models of the Hugging Face hub, as local folders
"""
