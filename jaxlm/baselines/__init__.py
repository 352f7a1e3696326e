"""Baselines: models that count words, to compare a trained model with.

ngrams        n-gram language models with modified Kneser-Ney smoothing
arpa          n-gram models of words as ARPA files
language      the n-gram model of the data of a language model
classifiers   the most frequent label, and linear models of TF-IDF features
result        the scores of a baseline
comparison    all baselines of a task, and the table that compares a model with them

Suffixes of names: N tokens of several texts, G n-grams of one order, C contexts (their first tokens), D values of an
adjusted count that have a discount: 0, 1, 2, and 3 for 3 and more.
"""
