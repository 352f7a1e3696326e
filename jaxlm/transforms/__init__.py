"""Changes of a model's parameters.

vocabulary  another number of tokens
"""
