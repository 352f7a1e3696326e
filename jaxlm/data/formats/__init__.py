"""Readers of data files. Each reads a format as a stream of rows with their places.

rows         the table of formats
lines        text files: decompression, decoding, splitting into lines
tables       csv and tsv
json_rows    JSON and JSON lines
columnar     Parquet
conll        one token per line
squad        the JSON of SQuAD
tfds         tensorflow-datasets, without TensorFlow
literals     lists and objects that a table contains as text
tokens       token ids that another program wrote
class_names  class names for integer labels from metadata
"""
