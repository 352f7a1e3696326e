"""Any text for a text, from a pre-trained T5, Flan-T5, mT5 or BART: answers, translations, summaries, classes as words.

    python train.py configs/finetune_t5.py --init MODEL --data.path train.jsonl --task.source question \
        --task.target answer --task.prefix "question: "

MODEL is a folder or a hub name.  Csv, tsv, json lines, parquet or tfds; a tenth is held out unless --data.eval-path
gives other data.  --task.scored-as translation or summary scores by BLEU or ROUGE in place of exact match.

Not measured from a real T5, which could not be downloaded where this was written.  From the T5 of 8 million parameters
that `t5_pretrain.py` makes of 3.4 MB it learns nothing: the kinds of TREC's questions as words, 0.200 exact.
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
