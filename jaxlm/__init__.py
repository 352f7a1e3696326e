"""jaxlm: pre-train, fine-tune, evaluate and run Transformer language models in JAX.

lm = jaxlm.fit(run)                                   # train what a RunConfig says
lm = jaxlm.load("runs/quickstart")                    # a run, or a model in Hugging Face's format
jaxlm.generate(lm, ["The"], max_new_tokens=20)        # continuations of prompts
jaxlm.encode(lm, ["a text", "another"])               # embeddings, pooled as the checkpoint declares
jaxlm.predict(lm, ["a text", "another"])              # what a fine-tuned model tells of them, with its confidence
jaxlm.save(lm, "folder")                              # for transformers to load
"""

__version__ = "0.1.0"

from jaxlm.devices.process import interrupts_wait as _interrupts_wait

with _interrupts_wait():
    from jaxlm.config import (
        CleaningConfig,
        DataConfig,
        Decoding,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
        RunConfig,
        TokenizerConfig,
    )
    from jaxlm.config import task as _task
    from jaxlm.config.task import *
    from jaxlm.errors import RunError, Stopped, UserError
    from jaxlm.hub.pooling import Pooling
    from jaxlm.inference.encode import encode
    from jaxlm.inference.generate import generate, stream
    from jaxlm.lm import LM, load, save
    from jaxlm.run.evaluate import evaluate, predict
    from jaxlm.run.fit import fit
    from jaxlm.transforms.vocabulary import resize

__all__ = [
    "LM",
    "CleaningConfig",
    "DataConfig",
    "Decoding",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Pooling",
    "RunConfig",
    "RunError",
    "Stopped",
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
__all__ += _task.__all__
