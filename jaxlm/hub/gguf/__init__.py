"""GGUF, the file format of llama.cpp: one file with the config, the tensors, the tokenizer and the chat template.

container   reading a file: the checked header, and tensors that are dequantised when they are read
tables      two-way tables of the metadata and the names of tensors, for each architecture
vocabulary  two-way conversion of the metadata of tokenizers
words       how a tokenizer splits texts into words, by the name that a file gives it
folder      a file as a folder in Hugging Face format
writing     writing a file, with quantised tensors
"""
