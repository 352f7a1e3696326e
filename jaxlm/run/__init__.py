"""Training runs, from the config to the exported model.

fit            trains a run: resolve, set up, loop, finish
resolve        decides what a config leaves open, and checks it once
word_vectors   trains word vectors
config_only    resolves a run without its data, for plans
trained_model  resolves a trained model and its task, for prediction and evaluation
weights        reads the weights that a run starts from
teacher        reads the weights of the teacher of a run, and checks that they fit
teacher_cache  fills the cache of the predictions of a teacher
nodes          the nodes that replace projections: updates of an adapter, rounded weights
training       a run in progress, and the work between its steps
export         writes the model in Hugging Face format
finish         writes scores, report and summary
assembly       the model, the state and the step on a mesh
step           (TrainState, Batch) -> (TrainState, metrics)
privacy        private training: the noise, the privacy loss, the clipped gradient
optimizer      the optax chain
pruning        pruning while training, as a part of it
checkpoint     checkpoints with Orbax and checksums
measure        speed and memory of the steps
folder         the files of a run folder
evaluate       evaluation and prediction, over every example once
baseline       the baselines of a config, without a model
sweep          many runs of one config
compress       smaller variants of a model, compared in a table
"""
