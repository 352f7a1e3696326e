"""Changes of a model's parameters.

low_rank    low-rank updates of frozen matrices
masked      arrays of which some entries stay zero
quantized   arrays in eight bits
vocabulary  another number of tokens
"""
