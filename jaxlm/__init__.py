"""jaxlm: pre-train, fine-tune, evaluate and run Transformer language models in JAX.

lm = jaxlm.fit(run)                                   # train what a RunConfig says
lm = jaxlm.load("runs/quickstart")                    # a run, or a model in Hugging Face's format
jaxlm.generate(lm, ["The"], max_new_tokens=20)        # continuations of prompts
jaxlm.encode(lm, ["a text", "another"])               # embeddings, pooled as the checkpoint declares
jaxlm.save(lm, "folder")                              # for transformers to load
"""

__version__ = "0.1.0"

from jaxlm.config import (
    CausalLM,
    CleaningConfig,
    DataConfig,
    MaskedLM,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
)
from jaxlm.encode import Pooling, encode
from jaxlm.errors import RunError, Stopped, UserError
from jaxlm.fit import fit
from jaxlm.generate import generate
from jaxlm.lm import LM, load, save

__all__ = [
    "LM",
    "CausalLM",
    "CleaningConfig",
    "DataConfig",
    "MaskedLM",
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
    "fit",
    "generate",
    "load",
    "save",
]
