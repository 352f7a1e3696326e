"""Audits and protection: bias, filters of outputs, privacy of training data.

filters          filters of texts: words, patterns, personal data, copies, a classifier
word_lists       lists of words and regular expressions
safe_generation  answers that pass filters
"""
