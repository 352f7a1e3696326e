"""jaxlm: pre-train, fine-tune, evaluate and run Transformer language models in JAX.

lm = jaxlm.fit(run)                                   # train what a RunConfig says
lm = jaxlm.load("runs/quickstart")                    # a run, or a model in Hugging Face's format
jaxlm.generate(lm, ["The"], max_new_tokens=20)        # continuations of prompts
jaxlm.encode(lm, ["a text", "another"])               # embeddings, pooled as the checkpoint declares
jaxlm.predict(lm, ["a text", "another"])              # what a fine-tuned model tells of them, with its confidence
jaxlm.save(lm, "folder")                              # for transformers to load
"""

__version__ = "0.1.0"

from jaxlm.process import interrupts_wait as _interrupts_wait

with _interrupts_wait():
    from jaxlm.config import (
        CausalLM,
        Chat,
        Classification,
        CleaningConfig,
        DataConfig,
        Decoding,
        Infilling,
        MaskedLM,
        MeshConfig,
        ModelConfig,
        MultipleChoice,
        MultiTask,
        OptimizerConfig,
        Part,
        QuestionAnswering,
        RunConfig,
        Seq2Seq,
        Similarity,
        SpanCorruption,
        Tagging,
        TokenizerConfig,
    )
    from jaxlm.encode import Pooling, encode
    from jaxlm.errors import RunError, Stopped, UserError
    from jaxlm.evaluate import evaluate, predict
    from jaxlm.fit import fit
    from jaxlm.generate import generate, stream
    from jaxlm.lm import LM, load, save
    from jaxlm.vocabulary import resize

__all__ = [
    "LM",
    "CausalLM",
    "Chat",
    "Classification",
    "CleaningConfig",
    "DataConfig",
    "Decoding",
    "Infilling",
    "MaskedLM",
    "MeshConfig",
    "ModelConfig",
    "MultiTask",
    "MultipleChoice",
    "OptimizerConfig",
    "Part",
    "Pooling",
    "QuestionAnswering",
    "RunConfig",
    "RunError",
    "Seq2Seq",
    "Similarity",
    "SpanCorruption",
    "Stopped",
    "Tagging",
    "TokenizerConfig",
    "UserError",
    "encode",
    "evaluate",
    "fit",
    "generate",
    "load",
    "predict",
    "resize",
    "save",
    "stream",
]
