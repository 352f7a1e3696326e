"""Using trained models: texts, likelihoods and embeddings.

generate             texts from prompts
decode               the compiled programs of generation
beam, speculative    beam search and speculative decoding
generation_defaults  the generation settings of a checkpoint
prompts              files of prompts, and files of their texts
likelihood           log-probabilities of texts
pseudo_likelihood    log-probabilities of tokens that are masked alone
lm_eval              a model for lm-evaluation-harness
encode               embeddings of texts
packing              rows of examples, and batches in flight
"""
