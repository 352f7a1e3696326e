"""jaxlm: pre-train, fine-tune, evaluate and run Transformer language models in JAX.

lm = jaxlm.fit(run)                                   # train a model as a RunConfig describes
lm = jaxlm.load("runs/quickstart")                    # load a run, or a model in Hugging Face format
jaxlm.generate(lm, ["The"], max_new_tokens=20)        # continue prompts
jaxlm.encode(lm, ["a text", "another"])               # embed texts, pooled as the checkpoint declares
jaxlm.predict(lm, ["a text", "another"])              # predict with a fine-tuned model, with confidences
jaxlm.quantize(lm, "int4")                            # weights of 8 or 4 bits
jaxlm.save(lm, "folder")                              # write a model that transformers can load
"""

__version__ = "0.1.0"

from jaxlm.devices.process import delay_interrupts as _interrupts_wait

with _interrupts_wait():
    from jaxlm.config import (
        AdapterConfig,
        BaselineConfig,
        CleaningConfig,
        DataConfig,
        Decoding,
        DistillConfig,
        GloVeConfig,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
        PrivacyConfig,
        PruneConfig,
        QuantizeConfig,
        RunConfig,
        SkipGramConfig,
        TokenizerConfig,
        VectorsConfig,
    )
    from jaxlm.config import record_tasks as _record_tasks
    from jaxlm.config import text_tasks as _text_tasks
    from jaxlm.config.record_tasks import *
    from jaxlm.config.text_tasks import *
    from jaxlm.errors import RunError, Stopped, UserError
    from jaxlm.hub.pooling import Pooling
    from jaxlm.inference.encode import encode
    from jaxlm.inference.generate import generate, stream
    from jaxlm.lm import LM, load, save
    from jaxlm.run.evaluate import evaluate, predict
    from jaxlm.run.fit import fit
    from jaxlm.run.word_vectors import fit_vectors
    from jaxlm.transforms.adapters import add_adapter, merge, remove_adapters
    from jaxlm.transforms.lengthening import lengthen
    from jaxlm.transforms.pruning import prune
    from jaxlm.transforms.quantization import quantize
    from jaxlm.transforms.structured import shrink
    from jaxlm.transforms.vocabulary import resize
    from jaxlm.vectors.files import load_vectors, save_vectors
    from jaxlm.vectors.word_vectors import WordVectors

__all__ = [
    "LM",
    "AdapterConfig",
    "BaselineConfig",
    "CleaningConfig",
    "DataConfig",
    "Decoding",
    "DistillConfig",
    "GloVeConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Pooling",
    "PrivacyConfig",
    "PruneConfig",
    "QuantizeConfig",
    "RunConfig",
    "RunError",
    "SkipGramConfig",
    "Stopped",
    "TokenizerConfig",
    "UserError",
    "VectorsConfig",
    "WordVectors",
    "add_adapter",
    "encode",
    "evaluate",
    "fit",
    "fit_vectors",
    "generate",
    "lengthen",
    "load",
    "load_vectors",
    "merge",
    "predict",
    "prune",
    "quantize",
    "remove_adapters",
    "resize",
    "save",
    "save_vectors",
    "shrink",
    "stream",
]
__all__ += _record_tasks.__all__
__all__ += _text_tasks.__all__
