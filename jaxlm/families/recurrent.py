"""Recurrent and convolutional models: classifiers, taggers, a language model, and an encoder-decoder with attention.

No family supports them; they are saved in jaxlm's own format.
"""

from __future__ import annotations

from typing import Any

from jaxlm.config import ModelConfig

# The layers alone: no norms, no residual connections around the mixer, no MLPs, no positions.
PLAIN: dict[str, Any] = {
    "heads": 1,
    "positions": "none",
    "norm_place": "none",
    "mixer_residual": False,
    "feed_forward": "none",
    "initial_by_inputs": True,
    "initial_std": 0.1,
}


def _encoder(mixer: str, head: Any, width: int, layers: int, **fields: Any) -> ModelConfig:
    shared: dict[str, Any] = {
        "structure": "encoder",
        "heads_on_top": (head,),
        "mixer": mixer,
        "vocabulary": 8000,
        "classes_from": "max",
        "classes_activation": None,
    }
    return ModelConfig(**PLAIN | shared | {"width": width, "layers": layers} | fields)


def _decoder(mixer: str, width: int, layers: int, **fields: Any) -> ModelConfig:
    return ModelConfig(**PLAIN | {"mixer": mixer, "width": width, "layers": layers} | fields)


PRESETS = {
    # In both directions, with the maximum over time (Conneau et al. 2017).
    "lstm-classifier": _encoder("lstm", "classes", 300, 1, dropout=0.5),
    "gru-classifier": _encoder("gru", "classes", 300, 1, dropout=0.5),
    # Kim (2014): 100 features of each window, and dropout before the output.
    "cnn-classifier": _encoder(
        "convolution", "classes", 300, 1, conv_windows=(3, 4, 5), conv_activation="relu", classes_dropout=0.5
    ),
    # Lample et al. (2016) and Huang et al. (2015); with --task.crf, a BiLSTM-CRF.
    "lstm-tagger": _encoder("lstm", "tokens", 300, 1, dropout=0.5),
    "gru-tagger": _encoder("gru", "tokens", 300, 1, dropout=0.5),
    # The medium model of Zaremba et al. (2014), with tied embeddings (Press and Wolf 2017).
    "lstm-lm": _decoder("lstm", 650, 2, vocabulary=10000, dropout=0.5),
    "gru-lm": _decoder("gru", 650, 2, vocabulary=10000, dropout=0.5),
    # Attention over the encoder after each layer of the decoder, added to its output (Luong et al. 2015).
    "lstm-seq2seq": _decoder("lstm", 512, 2, vocabulary=8000, dropout=0.3, structure="encoder_decoder", start_token=0),
    "gru-seq2seq": _decoder("gru", 512, 2, vocabulary=8000, dropout=0.3, structure="encoder_decoder", start_token=0),
}
