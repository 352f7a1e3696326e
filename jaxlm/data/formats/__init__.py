"""Readers of data files: each format as a stream of rows with their places.

rows         the table of formats
lines        text files, unpacked, decoded and divided into lines
tables       csv and tsv
json_rows    JSON and JSON lines
columnar     Parquet
conll        tokens on lines
squad        questions of SQuAD's JSON
tfds         tensorflow-datasets, without TensorFlow
literals     lists and objects that a table holds as text
class_names  names that a data set's metadata gives to integers
"""
