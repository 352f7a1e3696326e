"""The Transformer, as Linen modules that a reader can follow in one sitting.

transformer  the stacked Transformer: encoder, decoder, or both
layers       projections, norms, the MLP, dropout
attention    self and cross attention, grouped queries, local, relative, cached
kernels      fused attention over packed rows
positions    learned, sinusoidal, rotary and relative positions
heads        what is read off the last hidden states
losses       each returns (sum, weight)
nodes        what may stand in the place of a dense array, such as a low-rank update
parameters   the one table that knows the parameters
flops        counts of floating-point operations

In tensor code a name carries its shape, in these letters:

    B  rows of a batch          D  model width             V  vocabulary
    T  positions (queries)      H  attention heads         L  layers
    S  positions (keys)         K  key-value heads         P  positions that have an embedding
    E  examples in a row        G  heads per key-value head
    F  MLP width                C  head width              R  relative distances
    W  embedding width          c  pairs in a head         N  labels
"""
