"""The page of a run, and its plots.

report     the page, and all functions for notebooks and scripts
notebook   single pictures and tables: curves, confusion, attention, meshes
live       a curve that is redrawn while a run trains
pages      a page of chapters, for explanations and audits
figures    pictures and tables as parts of a page
charts     the charts of a run, from its log
metrics    the log, and the name, family and format of each metric
tables     tables of text, and masked text
pictures   each plot as one PNG
rendering  HTML from the templates and style sheets in templates/
"""
