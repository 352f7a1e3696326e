"""SciTLDR: one-sentence summaries of scientific abstracts (Cachola et al. 2020), with a pretrained encoder-decoder.

    python train.py configs/summarize_scitldr.py --init MODEL --data.path train.jsonl --data.eval-path dev.jsonl
    python -m jaxlm evaluate runs/summarize_scitldr test.jsonl

MODEL is a folder or a hub name, such as facebook/bart-base.  The files are those of SciTLDR-A: the sentences of each
abstract and one or several summaries; the score of an abstract is that of its best matching summary.

Not measured with a real BART.  Measured in November 2026 with seed 0, --optimizer.rate 1e-2 and --optimizer.relative,
with the T5 of 8 million parameters that `t5_pretrain.py` trains on 3.4 MB:

Hardware         2 CPU cores, shared with other processes
Time             about 41 min for 5 epochs, stopped once and resumed
Score            dev part: ROUGE-1 21.8 after the first epoch, 21.5 at the end; test part, with the weights after the
                 first epoch: ROUGE-1 24.4, ROUGE-2 6.3, ROUGE-L 20.5
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
