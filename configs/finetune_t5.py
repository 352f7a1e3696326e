"""Any text for a text, from a pre-trained T5, Flan-T5, mT5 or BART: answers, translations, summaries, classes as words.

    python train.py configs/finetune_t5.py --init MODEL --data.path train.jsonl --task.source question \
        --task.target answer --task.prefix "question: "

MODEL is a folder or a hub name.  Csv, tsv, json lines, parquet or tfds; a tenth is held out unless --data.eval-path
gives other data.  --task.scored-as translation or summary scores by BLEU or ROUGE in place of exact match.

Not measured from a real T5, which could not be downloaded where this was written.  From the T5 of 8 million parameters
that `t5_pretrain.py` makes of 3.4 MB, on 2 CPU cores (November 2026, seed 0): the kinds of TREC's 5,452 questions as
words, 0.854 exact on its 500 test questions, the best of 6 epochs by the same, in 6 min 45 s beside other work:

    --init runs/t5_pretrain --task.source-length 64 --data.length 16 --optimizer.name adamw --optimizer.rate 1e-2 \
        --optimizer.schedule linear --optimizer.final 0 --optimizer.warmup 0.1 --epochs 6

Pre-trained and fine-tuned at rates that are not in proportion to each tensor (`--optimizer.no-relative`) it was 0.45.
"""

from jaxlm import DataConfig, Decoding, OptimizerConfig, RunConfig, Seq2Seq


def config() -> RunConfig:
    return RunConfig(
        model=None,
        task=Seq2Seq(
            source_length=512,
            scored_as="answer",
            generated=500,
            decoding=Decoding(max_new_tokens=64, temperature=0.0),
        ),
        data=DataConfig(length=128),
        # Raffel et al. fine-tune at a constant 1e-3 with Adafactor.
        optimizer=OptimizerConfig(
            name="adafactor", rate=1e-3, relative=True, schedule="constant", warmup=0.05, weight_decay=0.0
        ),
        examples=32,
        epochs=3,
        log_every=20,
    )
