"""Tokenizers: loading, training, saving.

tokenizer     conversion of text to token ids and back; training
vocabularies  readers of the tokenizer files of checkpoints
pieces        conversion of sentencepiece models
"""
