"""The page of a run, and its plots.

report    the page, and what a task can show on it
pictures  each plot as one PNG
"""
