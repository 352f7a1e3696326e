"""The input pipeline: rows of text -> documents -> tokens on disk -> examples -> packed rows -> `batch_at(step)`.

source      rows of text from files, folders, globs and tensorflow-datasets
formats     readers of file formats
clean       cleaning of the text of a row
personal_data  addresses, phone, card and identity numbers in texts
holdout     choice of the held-out documents
tokenizers  loading, training and saving of tokenizers
spool       documents in one file, for several passes
tokenizing  documents to the files of a corpus
token_ids   corpora of token ids that another program wrote
corpus      tokenized documents on disk, memory-mapped
joined      arrays of several examples one after another
corrupt     masking, span corruption and infilling
chat        conversations, formatted by chat templates
pack        packing of examples into rows
batches     random access to batches by step
poisson     batches of a random number of examples, for private training
example_cache  arrays of examples on disk, such as predictions of a teacher
ahead       results that other threads compute before they are used

Besides the letters of `jaxlm.nn`, suffixes of names are here: N tokens of several texts, X examples or texts, U units,
P spans.
"""
