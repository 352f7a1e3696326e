"""The generation settings of a checkpoint are checked and are the defaults. The caller's settings override them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jaxlm import Decoding
from jaxlm.errors import UserError
from jaxlm.inference.generation_defaults import GenerationDefaults, describe_defaults, merge_settings, read_defaults

BART = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3, "max_length": 142}
BART |= {"min_length": 56, "forced_bos_token_id": 0, "forced_eos_token_id": 2, "eos_token_id": 2, "bos_token_id": 0}
LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128009], "max_length": 4096}


def read(values, config=None) -> GenerationDefaults:
    return read_defaults(None if values is None else json.dumps(values).encode(), config or {})


NO_SETTINGS = [
    None,
    {},
    {"eos_token_id": 5, "transformers_version": "5.0", "_from_model_config": True},
    {"top_k": None},
]


@pytest.mark.parametrize("values", NO_SETTINGS, ids=str)
def test_a_checkpoint_without_settings_changes_nothing(values):
    defaults = read(values)
    assert merge_settings(None, {}, defaults) == Decoding() and not list(describe_defaults(defaults))
    assert merge_settings(None, {"top_p": 0.5}, defaults) == Decoding(top_p=0.5)


def test_settings_of_beam_search_are_read():
    settings = dict(beams=4, length_penalty=2.0, early_stopping=True, no_repeat_ngram_size=3, max_length=142)
    assert merge_settings(None, {}, read(BART)) == Decoding(temperature=0.0, min_length=56, **settings)
    assert (read(BART).eos, read(BART).forced_bos, read(BART).forced_eos) == ((2,), 0, (2,))


def test_sampling_has_the_defaults_of_transformers():
    decoding = merge_settings(None, {}, read(LLAMA))
    assert decoding == Decoding(temperature=0.6, top_p=0.9, top_k=50, max_length=4096)  # 50 if a file names no top_k
    assert merge_settings(None, {}, read(LLAMA | {"top_k": 0})).top_k == 0
    assert merge_settings(None, {}, read({"temperature": 0.6, "top_p": 0.9})) == Decoding(
        temperature=0.0
    )  # no do_sample
    assert merge_settings(None, {}, read({"do_sample": True})) == Decoding(top_k=50)


def test_settings_of_an_older_checkpoint_are_in_config_json():
    config = {"model_type": "bart", **BART}
    assert merge_settings(None, {}, read(None, config)).beams == 4
    # As in transformers, the settings come from one file only.
    assert merge_settings(None, {}, read({"eos_token_id": 7}, config)) == Decoding()
    assert read({"eos_token_id": 7}, config).eos == (7,) and read({}, config).eos == (2,)
    # In a config.json of jaxlm, max_length is the length of the model, not a generation setting.
    assert merge_settings(None, {}, read(None, {"max_length": 1024})) == Decoding()


OVERRIDES = {
    "max_new_tokens": (BART, {"max_new_tokens": 20}, {"max_length": 0, "max_new_tokens": 20, "min_length": 56}),
    "min_new_tokens": (BART, {"min_new_tokens": 3}, {"min_length": 0, "min_new_tokens": 3}),
    "short texts": (
        {"min_new_tokens": 9, "max_new_tokens": 99},
        {"max_new_tokens": 5},
        {"min_new_tokens": 5, "max_new_tokens": 5},
    ),
    "sampling": (BART, {"temperature": 0.7}, {"beams": 1, "temperature": 0.7, "no_repeat_ngram_size": 3}),
    "top-p for a greedy checkpoint": ({"no_repeat_ngram_size": 3}, {"top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
    "greedy": (BART, {"temperature": 0.0}, {"beams": 4, "temperature": 0.0}),
    "beams for sampled texts": (
        LLAMA,
        {"beams": 3},
        {"beams": 3, "temperature": 0.0, "top_p": 1.0, "top_k": 0},
    ),
    "one beam": (BART | {"num_return_sequences": 3}, {"beams": 1}, {"beams": 1, "n_best": 1, "temperature": 0.0}),
    "fewer beams": (BART | {"num_return_sequences": 3}, {"beams": 2}, {"beams": 2, "n_best": 2}),
    "greedy with several sequences": (LLAMA | {"num_return_sequences": 3}, {"temperature": 0.0}, {"n_best": 1}),
    "NumPy": (BART, {"beams": np.int64(2), "length_penalty": np.float32(0.5)}, {"beams": 2, "length_penalty": 0.5}),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_arguments_override_the_checkpoint(name):
    values, arguments, expected = OVERRIDES[name]
    decoding = merge_settings(None, arguments, read(values))
    decoding.check()
    assert {field: getattr(decoding, field) for field in expected} == expected


def test_a_decoding_is_used_unchanged():
    assert merge_settings(Decoding(beams=2, temperature=0.0), {"seed": 3}, read(BART)) == Decoding(
        beams=2, temperature=0.0, seed=3
    )
    with pytest.raises(UserError, match="perhaps you meant 'temperature'"):
        merge_settings(None, {"temprature": 1}, read(BART))
    for arguments, message in (
        ({"beams": "a"}, "beams is 'a'"),
        ({"top_k": None}, "top_k is None"),
        ({"n_best": 10**6}, "10,000"),
    ):
        with pytest.raises(UserError, match=message):
            merge_settings(None, arguments, read(BART))


def test_used_and_ignored_settings_are_reported():
    used, *ignored = describe_defaults(
        read(BART | {"typical_p": 0.9, "encoder_repetition_penalty": 1.0, "diversity_penalty": 0.5})
    )
    assert "beams 4, length_penalty 2.0, early_stopping True" in used
    assert len(ignored) == 1 and "typical_p, diversity_penalty of generation_config.json" in ignored[0]
    assert "do_sample together with num_beams" in "".join(describe_defaults(read({"do_sample": True, "num_beams": 2})))


WRONG = {
    "temperature": ["0.7", -1, True, [], 1e400],
    "top_k": [-1, 1.5, "50", 2**40],
    "top_p": [1.5, -0.1, "1"],
    "min_p": [2, "a"],
    "no_repeat_ngram_size": [-3, 2.0, [3]],
    "repetition_penalty": [0, -1.0, {}, "1.2"],
    "length_penalty": ["long", [1]],
    "num_beams": [0, 10**6, 2.5, True],
    "early_stopping": ["always", 1, 0.5, []],
    "num_return_sequences": [0, 10**7],
    "max_length": [0, "20", 2**50],
    "min_new_tokens": [-1],
    "do_sample": [1, "true"],
    "stop_strings": [3, [3]],
    "eos_token_id": ["</s>", [1, "2"], 1.0, {"a": 1}],
    "bad_words_ids": [5, [5], [[]], [["a"]], "x"],
    "suppress_tokens": ["a", [None]],
    "forced_bos_token_id": ["de_DE"],
}


@pytest.mark.parametrize("key", WRONG)
def test_malformed_values_are_refused(key):
    for value in WRONG[key]:
        with pytest.raises(UserError, match=f"{key} is"):
            read({key: value})


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"\xff", b'"a"', b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}", b"9" * 5000]
)
def test_files_that_contain_no_object_are_refused(content):
    with pytest.raises(UserError, match=r"generation_config\.json"):
        read_defaults(content, {})
