"""BERT from scratch: masked language modelling and next-sentence prediction on text with document boundaries.

    python train.py configs/bert_pretrain.py --data.path TEXT

TEXT is a plain or gz text file with one sentence or paragraph per line and a blank line between documents.  If
documents begin with a heading instead, as in WikiText, add a pattern for it:

    --data.documents boundary --data.boundary '^ = [^=]+ = $'

For a small corpus, use rotary positions.  With learned positions the masked LM loss stays near the unigram entropy for
thousands of steps, because a masked token has no information about its neighbours until attention has learned the
positions.  The export is then in jaxlm's own format, because Hugging Face's BERT has no rotary positions.

    --model.positions rotary --model.dropout 0 --model.attention-dropout 0

Measured in November 2026 with these flags and seed 0, on 1.26 MB of WikiText-2 (test.txt for training, valid.txt held
out), 1,200 steps of 16 x 128 tokens:

Hardware         2 CPU cores
Time             4 min 31 s
Score            held-out masked LM loss 4.07 nats, accuracy 0.36 (unigram entropy of the held-out text: 6.26 nats);
                 next-sentence accuracy 0.52 on 2,911 pairs, which is chance: this objective requires more text

With 40 MB of English documentation from Debian's packages (linux-doc, python3.11-doc, postgresql-doc-15, rust-doc and
others; paragraphs of at least 12 words, each once; 6,229 documents, a fortieth more held out), the same flags and 4,000
steps, which read 8.2 million tokens in about 67,000 pairs:

Time             1 h 13 min beside other processes (load 10)
Score            held-out masked LM loss 3.77 nats; next-sentence accuracy 0.610 on 2,062 pairs, 10 standard errors
                 above chance.  It was 0.500, 0.501 and 0.506 after 1,000, 2,000 and 3,000 steps: the model first learns
                 words
"""

from dataclasses import replace

from jaxlm import DataConfig, MaskedLM, OptimizerConfig, RunConfig, TokenizerConfig
from jaxlm.families import PRESETS


def config() -> RunConfig:
    return RunConfig(
        model=replace(PRESETS["bert-tiny"], vocabulary=4096, max_length=128, layers=4, heads=4, initial_std=0.05),
        task=MaskedLM(next_sentence=True, sentences="punctuation"),
        data=DataConfig(documents="blank_line", length=128),
        tokenizer=TokenizerConfig(train="wordpiece", lowercase=True),
        optimizer=OptimizerConfig(
            name="muon", rate=5e-3, beta1=0.95, schedule="linear", warmup=0.1, final=0.0, weight_decay=0.1
        ),
        batch=16,
        steps=1200,
        unroll=4,
        eval_every=200,
    )
