"""SciTLDR: a paper's abstract in one sentence (Cachola et al. 2020), from a pre-trained encoder-decoder.

    python train.py configs/summarize_scitldr.py --init MODEL --data.path train.jsonl --data.eval-path dev.jsonl
    python -m jaxlm evaluate runs/summarize_scitldr test.jsonl

MODEL is a folder or a hub name, such as facebook/bart-base.  The files are those of SciTLDR-A: the sentences of each
abstract, and one or several summaries, of which the best counts.

Not measured from a real BART, which could not be downloaded where this was written.  From the T5 of 8 million
parameters that `t5_pretrain.py` makes of 3.4 MB, with --optimizer.rate 1e-2 --optimizer.relative, on 2 CPU cores
(November 2026, seed 0): 5 epochs in about 41 min beside other work, stopped once and resumed.  The first epoch and
the end were scored on the dev part, ROUGE-1 21.8 and 21.5; the former's weights on the test part: ROUGE-1 24.4,
ROUGE-2 6.3, ROUGE-L 20.5.
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
