"""Tokenizers: load, train, save.

tokenizer     text to ids and back
vocabularies  the files in which checkpoints store vocabularies
pieces        sentencepiece models
"""
