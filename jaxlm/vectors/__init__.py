"""Word vectors: training, files, and initial embeddings of models.

word_vectors   WordVectors: words and their vectors; neighbours and analogies
files          files of word2vec and GloVe, read and written
words          the words of a text, counted and numbered
skipgram       skip-gram with negative sampling
cooccurrence   counts of words that occur near each other
glove          GloVe
training       what the two methods have in common: the state of a run and its batches
embeddings     the vectors of the tokens of a tokenizer
"""
