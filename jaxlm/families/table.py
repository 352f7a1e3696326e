"""The table of families and their published sizes, and the origin of a loaded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config import Head, ModelConfig
from jaxlm.families import (
    albert,
    bart,
    bert,
    bloom,
    deberta,
    deepseek,
    distilbert,
    electra,
    falcon,
    gemma,
    gpt2,
    gpt_oss,
    gptj,
    gptneo,
    granite,
    gte,
    led,
    llama,
    longformer,
    m2m_100,
    marian,
    mixtral,
    modernbert,
    mpnet,
    neox,
    nomic_bert,
    olmo,
    opt,
    pegasus,
    phi,
    recurrent,
    roberta,
    smollm,
    t5,
    transformer,
    xlnet,
)
from jaxlm.hub.convert import Family

FAMILIES: dict[str, Family] = {  # by `model_type` of config.json
    "bert": bert.FAMILY,
    "roberta": roberta.FAMILY,
    "xlm-roberta": roberta.XLM_ROBERTA,
    "camembert": roberta.CAMEMBERT,
    "longformer": longformer.FAMILY,
    "mpnet": mpnet.FAMILY,
    "distilbert": distilbert.FAMILY,
    "electra": electra.FAMILY,
    "albert": albert.FAMILY,
    "deberta-v2": deberta.FAMILY,
    "modernbert": modernbert.FAMILY,
    "nomic_bert": nomic_bert.FAMILY,
    "gte": gte.FAMILY,
    "new": gte.NEW,
    "xlnet": xlnet.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gpt_neo": gptneo.FAMILY,
    "gptj": gptj.FAMILY,
    "gpt_neox": neox.FAMILY,
    "opt": opt.FAMILY,
    "bloom": bloom.FAMILY,
    "falcon": falcon.FAMILY,
    "llama": llama.FAMILY,
    "mistral": llama.MISTRAL,
    "qwen2": llama.QWEN_2,
    "qwen3": llama.QWEN_3,
    "mixtral": mixtral.FAMILY,
    "qwen2_moe": mixtral.QWEN_2,
    "qwen3_moe": mixtral.QWEN_3,
    "gpt_oss": gpt_oss.FAMILY,
    "deepseek_v2": deepseek.V2,
    "deepseek_v3": deepseek.V3,
    "phi3": phi.FAMILY,
    "olmo2": olmo.FAMILY,
    "granite": granite.FAMILY,
    "smollm3": smollm.FAMILY,
    "gemma": gemma.FAMILY,
    "gemma2": gemma.GEMMA_2,
    "gemma3_text": gemma.GEMMA_3,
    "t5": t5.FAMILY,
    "mt5": t5.MT5,
    "bart": bart.FAMILY,
    "mbart": bart.MBART,
    "marian": marian.FAMILY,
    "pegasus": pegasus.FAMILY,
    "m2m_100": m2m_100.FAMILY,
    "led": led.FAMILY,
}
PRESETS: dict[str, ModelConfig] = (
    transformer.PRESETS
    | recurrent.PRESETS
    | {name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}
)
HeadChoice = str | tuple[Head, ...]  # one or several heads, "none" or "encoder"
OWN = "jaxlm"  # the `model_type` of our format, for models that no family supports


class Origin(NamedTuple):
    """The files from which a model was loaded, so that saving the model writes the same files.

    Attributes:
      config: the values of config.json.
      heads: the heads in the folder; None: other heads than the requested ones.
      names: name of each tensor in the file -> its name in the family's rules.
      dtypes: dtype of each tensor in the file.
      buffers: tensors that the model does not need.
      base: the folder or hub name with the weights of the model, without its adapters.
    """

    config: dict[str, Any]
    heads: tuple[Head, ...] | None = ()
    names: Mapping[str, str] = {}
    dtypes: Mapping[str, np.dtype] = {}
    buffers: Mapping[str, np.ndarray] = {}
    base: str = ""
