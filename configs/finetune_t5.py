"""Text to text with a pretrained T5, Flan-T5, mT5 or BART: answers, translations, summaries, classes as words.

    python train.py configs/finetune_t5.py --init MODEL --data.path train.jsonl --task.source question \
        --task.target answer --task.prefix "question: "

MODEL is a folder or a hub name.  The data may be csv, tsv, json lines, parquet or tfds; a tenth is held out unless
--data.eval-path is set.  --task.scored-as translation or summary reports BLEU or ROUGE instead of exact match.

Not measured with a real T5.  Measured in November 2026 with seed 0, with the T5 of 8 million parameters that
`t5_pretrain.py` trains on 3.4 MB.  It learns the classes of TREC's 5,452 questions as words, with these flags:

    --init runs/t5_pretrain --task.source-length 64 --data.length 16 --optimizer.name adamw --optimizer.rate 1e-2 \
        --optimizer.schedule linear --optimizer.final 0 --optimizer.warmup 0.1 --epochs 6

Hardware         2 CPU cores, shared with other processes
Time             6 min 45 s
Score            0.854 exact match on the 500 test questions, the best of 6 epochs, selected on the same questions; 0.45
                 if both runs use --optimizer.no-relative (rates that are not scaled to each tensor)
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
        # Raffel et al. fine-tune with Adafactor at a constant rate of 1e-3.
        optimizer=OptimizerConfig(
            name="adafactor", rate=1e-3, relative=True, schedule="constant", warmup=0.05, weight_decay=0.0
        ),
        examples=32,
        epochs=3,
        log_every=20,
    )
