"""The input pipeline: rows of text -> documents -> tokens on disk -> examples -> packed rows -> `batch_at(step)`.

source      rows of text from files, folders, globs and tensorflow-datasets
formats     readers of file formats
clean       cleaning of the text of a row
holdout     choice of the held-out documents
tokenizers  loading, training and saving of tokenizers
corpus      tokenized documents on disk, memory-mapped
corrupt     masking, span corruption and infilling
chat        conversations, formatted by chat templates
pack        packing of examples into rows
batches     random access to batches by step
"""
