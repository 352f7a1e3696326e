"""What a trained model is used for: texts, likelihoods and vectors.

generate             texts from prompts
decode               the compiled programs of generation
beam, speculative    other ways to choose tokens
generation_defaults  what a checkpoint declares about generation
prompts              files of prompts, and files of their texts
likelihood           log-probabilities of texts
lm_eval              a model for lm-evaluation-harness
encode               vectors of texts
"""
