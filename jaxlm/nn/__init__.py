"""The Transformer as Linen modules, and the functions around it.

transformer  embeddings, an encoder, a decoder, or both, and heads
stack        the layers of an encoder or a decoder, and their inputs
block        one layer of a stack, and the tables of its modules
sites        the places in a layer whose activations can be read and edited
layer_parts  the parts of each layer of a stack, and the rows of stacked parameters
embeddings   embeddings of tokens, and the table of front ends
layers       projections, norms, the MLP, dropout
experts      feed-forward layers of routed experts
attention    self-attention and cross-attention
dot_product  scaled dot-product attention in plain XLA, from rows or from a cache
masks        which keys a query attends to
latent       attention with a cache of projections of the hidden states
linear_attention  the gated delta rule in place of self-attention
recurrent    LSTM and GRU in place of self-attention
convolutional  convolutions in place of self-attention
cache        keys and values of earlier tokens
kernels      fused attention over packed rows
windows      local attention in blocks, with memory in proportion to the length
global_tokens  the tokens of an example with global attention
positions    learned, sinusoidal, rotary and relative positions
heads        outputs computed from the last hidden states
crf          scores of sequences of tags, for tagging
groups       the positions of a batch in groups, each with a copy of the parameters of a head
fusion       values that XLA does not compute together on a GPU
preferences  losses of pairs of answers (DPO, IPO, SimPO, ORPO)
losses       losses and metrics as pairs (sum, weight)
relations    relations between the tokens of an example, for distillation
nodes        parameters in another form than a dense array
low_rank     the node of low-rank updates (LoRA)
masked       the node of arrays with some entries fixed at zero
quantized    the node of quantised weights, in 8 or 4 bits
parameters   the table of parameters: logical axes, weight decay, depth
flops        counts of floating-point operations

In tensor code the suffix of a name is its shape, in these letters:

    B  rows of a batch          D  model width             V  vocabulary
    T  positions (queries)      H  attention heads         L  layers
    S  positions (keys)         K  key-value heads         P  positions that have an embedding
    E  examples in a row        G  heads per key-value head
    F  MLP width                C  head width              R  relative distances; relation heads
    W  embedding width          c  pairs in a head         N  labels
    M  groups of positions      X  experts                 k  experts of a token
    Q  targets of a query stream   n  blocks of a row             g  global tokens of a row
"""
