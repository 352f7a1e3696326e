"""The resources that a model and a run require, before the run.

plan     compiles the step of a run ahead of time for other chips
hlo      collectives and memory traffic of a compiled program
inspect  a table of a model's parameters
"""
