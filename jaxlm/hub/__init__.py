"""Checkpoints in the formats of Hugging Face.

convert             two-way conversion tables: import, export, and reports of missing and unexpected tensors
safetensors         reading and writing folders of safetensors files
model_files         reading the small files of a model's folder
peft                the files of adapters in the format of PEFT
updates             the updates of these files as nodes, and the reverse
pooling             the embedding settings of sentence-transformers
gguf                files of llama.cpp, read and written
quantization        quantised checkpoints: dequantised, or refused
packed              matrices of GPTQ, AWQ, bitsandbytes and compressed-tensors
compressed_tensors  quantised models in that format: written, and read as nodes
place               loading of tensors onto devices, shard by shard
download            downloads from the Hugging Face hub
"""
