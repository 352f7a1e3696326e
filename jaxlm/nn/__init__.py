"""The Transformer, as Linen modules that a reader can follow in one sitting.

In tensor code a name carries its shape, in these letters:

    B  rows of a batch          D  model width             V  vocabulary
    T  positions (queries)      H  attention heads         L  layers
    S  positions (keys)         K  key-value heads         P  positions that have an embedding
    E  examples in a row        G  heads per key-value head
    F  MLP width                C  head width              R  relative distances
    W  embedding width          c  pairs in a head         N  labels
"""
