"""Writes families.npz: what transformers computes with tiny models of every family and head.

    PYTHONPATH=tests python tests/goldens/make_families.py [FAMILY ...]      (needs pip install -e '.[parity]')

Without names it computes all families; with names it replaces the outputs of these families, such as Longformer.
The file holds no weights: they are drawn from their names, here and in tests/test_goldens.py, by NumPy's frozen
RandomState.  Of each model it holds config.json, the names and shapes of its tensors, and its outputs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import test_goldens
import test_parity
import torch
import transformers

from jaxlm.hub import safetensors


def main() -> None:
    chosen = sys.argv[1:] or list(test_parity.FAMILIES)
    models, arrays = test_goldens.goldens() if sys.argv[1:] else ({}, {})
    for family, (_, heads, shapes) in test_parity.FAMILIES.items():
        if family not in chosen:
            continue
        for head in heads:
            model = test_parity.transformers_model(family, head, next(iter(shapes)))
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                stored = safetensors.read(Path(folder)).items()
                sinusoids = "embed_positions" if family in test_parity.SINUSOIDAL else "none"  # fixed, not to be drawn
                tensors = {name: list(x.shape) for name, x in stored if sinusoids not in name}
                config = json.loads((Path(folder) / "config.json").read_text())
                test_goldens.write(Path(folder) / "drawn", config, tensors)
                kind = getattr(transformers, family + head)
                model = kind.from_pretrained(Path(folder) / "drawn", attn_implementation="eager").eval()
            inputs = test_goldens.inputs(config)
            given = {"input_ids": inputs["tokens_BT"], "attention_mask": inputs["mask_BT"]}
            if "target_tokens_BT" in inputs and head != "EncoderModel":
                given["decoder_input_ids"] = inputs["target_tokens_BT"]
            with torch.no_grad():
                out = model(**{name: torch.tensor(x) for name, x in given.items()})
            name = family + head
            models[name] = {"config": config, "tensors": tensors}
            for output in ("logits", "prediction_logits", "start_logits", "end_logits", "last_hidden_state"):
                if out.get(output) is not None:
                    arrays[f"{name}/{output}"] = out[output].numpy()
    arrays["models"] = np.frombuffer(json.dumps(models, sort_keys=True).encode(), np.uint8)
    np.savez_compressed(Path(__file__).with_name("families.npz"), **arrays)


if __name__ == "__main__":
    main()
