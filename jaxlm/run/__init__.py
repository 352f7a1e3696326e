"""A run from its config to its export.

fit          the run from beginning to end: resolve, set up, loop, finish
resolve      what a config leaves open, checked once
config_only  a run resolved without its data, for plans
weights      the weights that it starts from
training     the run that is set up, and what is done between steps
export       its model in Hugging Face's format
finish       its scores, report and summary
assembly     the model, its state and its step on a mesh
step         (TrainState, Batch) -> (TrainState, metrics)
optimizer    the optax chain
checkpoint   Orbax, with checksums
measure      how fast the steps are
folder       the run folder
evaluate     every example once, in the order of the data
sweep        many runs of one config
"""
