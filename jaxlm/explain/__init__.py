"""Explanations of predictions: which tokens, layers and training examples they depend on."""
