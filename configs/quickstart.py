"""A small GPT on the documentation that ships with Python: no download, minutes on two CPU cores.

    python train.py configs/quickstart.py

Measured in November 2026 with Python 3.11 and seed 0:

Hardware         2 CPU cores
Time             3 min 4 s to 4 min 10 s in total, depending on other load, with eight evaluations
Score            1.7439 bits per byte on the held-out last tenth.  xz -9e with the training part as context needs 1.41,
                 because the documentation repeats long passages word for word.

All settings were selected on the last tenth of the training part.
"""

from dataclasses import replace

from jaxlm import CausalLM, DataConfig, ModelConfig, OptimizerConfig, RunConfig, TokenizerConfig, samples
from jaxlm.storage import disk


def config() -> RunConfig:
    # The text is one document, and its last tenth is held out before the tokenizer is trained.
    data = DataConfig(documents="file", eval_choice="last", length=256)
    file = samples.documentation(disk.cache_folder(data.cache) / "quickstart.txt")
    return RunConfig(
        model=ModelConfig(vocabulary=2048, max_length=256, width=128, layers=4, heads=4, dropout=0.2),
        task=CausalLM(stride=128),
        data=replace(data, path=str(file)),
        tokenizer=TokenizerConfig(train="bpe"),
        # Muon and small batches: about fifteen epochs of a hundred thousand tokens, mostly learned in the first few.
        optimizer=OptimizerConfig(name="muon", rate=1e-2, beta1=0.95, schedule="linear", final=0.0, weight_decay=0.3),
        batch=8,
        steps=800,
        eval_every=100,
        unroll=4,
        sample_prompt="The ",
    )
