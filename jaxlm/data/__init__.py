"""From text to batches: rows of text -> documents -> tokens on disk -> examples -> packed rows -> `batch_at(step)`.

source      rows of text from files, folders, globs and tensorflow-datasets
formats     readers of the formats of files
clean       what is done to the text of a row
holdout     which documents are held out
tokenizers  load, train and save tokenizers
corpus      tokens on disk, memory-mapped
corrupt     masking, spans and gaps of denoising objectives
chat        conversations, by the chat templates of tokenizers
pack        examples to rows
batches     `batch_at(step)`
"""
