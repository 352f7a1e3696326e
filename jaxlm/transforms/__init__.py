"""Changes of a model's parameters.

low_rank    low-rank updates of frozen matrices
masked      arrays with some entries fixed at zero
quantized   arrays in eight bits
vocabulary  another number of tokens
"""
