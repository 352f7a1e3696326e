"""A small GPT on the documentation that every Python carries: no download, minutes on two CPU cores.

python train.py configs/quickstart.py
"""

import os
from pathlib import Path
from pydoc_data.topics import topics

from jaxlm import CausalLM, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.data.corpus import cache_folder

DATA = DataConfig(documents="file", eval_fraction=0.1, length=256)


def config() -> RunConfig:
    text = "".join(topics[name] for name in sorted(topics)).encode()
    file = cache_folder(DATA) / "quickstart.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(text)
    os.replace(part, file)
    return RunConfig(
        model=ModelConfig(vocabulary=1024, max_length=256, width=192, layers=4, heads=6, dropout=0.1),
        task=CausalLM(stride=128),
        data=DataConfig(**{**DATA.__dict__, "path": str(file)}),
        tokenizer=TokenizerConfig(train="unigram"),
        optimizer=OptimizerConfig(rate=2e-3, schedule="linear", warmup=0.05, final=0.0),
        batch=16,
        steps=1000,
        unroll=4,
        sample_prompt="The ",
    )
