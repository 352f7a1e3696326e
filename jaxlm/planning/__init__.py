"""What a model and a run would need, before the run.

plan     the step of a run, compiled ahead of time for other chips
hlo      what a compiled program does: its collectives, and the bytes that it moves
inspect  a table of a model's parameters
"""
