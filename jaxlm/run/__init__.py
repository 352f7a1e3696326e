"""A run from its config to its export.

fit         the run from beginning to end
start       initial weights, tokenizer, batch and steps
assembly    the model, its state and its step on a mesh
step        (TrainState, Batch) -> (TrainState, metrics)
optimizer   the optax chain
checkpoint  Orbax, with checksums
measure     how fast the steps are
folder      the run folder
evaluate    every example once, in the order of the data
sweep       many runs of one config
"""
