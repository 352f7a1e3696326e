"""The verbs of the command line, one file each; `jaxlm.__main__` lists them.

train, predict, evaluate, generate, compress, convert, inspect, plan, baseline, explain, audit  the verbs
arguments  what verbs share: flags, the config of a run, help
files      what predict, evaluate and compress share: a model, a file, and its scores
machine    settings of the process for JAX: CPU devices, memory, messages, the compilation cache
"""
