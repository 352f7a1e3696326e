"""SciTLDR: a paper's abstract in one sentence (Cachola et al. 2020), from a pre-trained encoder-decoder.

    python train.py configs/summarize_scitldr.py --init MODEL --data.path train.jsonl --data.eval-path dev.jsonl
    python -m jaxlm evaluate runs/summarize_scitldr test.jsonl

MODEL is a folder or a hub name, such as facebook/bart-base.  The files are those of SciTLDR-A: the sentences of each
abstract, and one or several summaries, of which the best counts.

Not measured: no pre-trained encoder-decoder could be downloaded where this was written.
"""

from jaxlm import DataConfig, Decoding, OptimizerConfig, RunConfig, Seq2Seq


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=Seq2Seq(
            source_length=512,
            scored_as="summary",
            label_smoothing=0.1,
            decoding=Decoding(max_new_tokens=60, min_new_tokens=5, temperature=0.0, beams=4),
        ),
        data=DataConfig(length=128),
        optimizer=OptimizerConfig(rate=3e-5, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.01, beta2=0.999),
        examples=32,
        epochs=5,
        log_every=20,
    )
