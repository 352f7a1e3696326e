"""The generation settings of a checkpoint: its `generation_config.json`, or its `config.json` where it has none.

They are the defaults of `generate`, as in transformers; arguments of the caller override them. A file that has any
setting but not `do_sample` means greedy decoding, as in transformers. A file without any leaves `Decoding` as it is.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from jaxlm.config import MAX_TEXTS, Decoding
from jaxlm.config.ranges import MAX_FLOAT, MAX_INT, check_fields
from jaxlm.errors import UserError, suggestion
from jaxlm.hub import model_files
from jaxlm.hub.model_files import JsonObject

if TYPE_CHECKING:
    from jaxlm.lm import LM

FILE = "generation_config.json"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # fields of `Decoding` for sampling only
TOP_K = 50  # default of transformers where a file sets do_sample without top_k
_CHOICES = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("num_beams", "length_penalty", "early_stopping", "num_return_sequences", "stop_strings"),
    *("max_new_tokens", "min_new_tokens", "max_length", "min_length"),
)
# Keys that change texts and are not supported -> the values with which they have no effect.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "penalty_alpha": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "guidance_scale": (1,),
    "constraints": ([],),
    "force_words_ids": ([],),
    "forced_decoder_ids": ([],),
    "renormalize_logits": (False,),
    "watermarking_config": (),
    "dola_layers": (),
    "max_time": (),
    "token_healing": (False,),
}


class GenerationDefaults(NamedTuple):
    """The generation settings in the files of a checkpoint.

    choices: fields of `Decoding`.
    eos: tokens that end a text.
    forced_eos: one of these tokens must end a text of the maximum length.
    suppressed, begin_suppressed: tokens that never occur, and that do not begin a text.
    forbidden: sequences that never occur.
    bos: the token at the beginning of a text.
    start: the start token of the decoder of an encoder-decoder.
    forced_bos: the first token of a text.
    ignored: keys that change texts in transformers and are not supported here.
    """

    choices: dict[str, Any]
    eos: tuple[int, ...]
    forced_eos: tuple[int, ...]
    suppressed: tuple[int, ...]
    begin_suppressed: tuple[int, ...]
    forbidden: tuple[tuple[int, ...], ...]
    bos: int | None
    start: int | None
    forced_bos: int | None
    ignored: tuple[str, ...]


def read_defaults(own: bytes | None, config: Mapping[str, Any]) -> GenerationDefaults:
    """Returns the defaults of a checkpoint.

    Args:
      own: the content of its generation_config.json; None: it has none.
      config: the values of its config.json, where older checkpoints have their settings.

    Raises:
      UserError: a value has a wrong type or is out of its range.
    """
    parsed: dict[str, Any] = {} if own is None else model_files.parse_object(own, FILE)
    # A config.json without model_type was written by jaxlm, and its max_length is the model's.
    legacy = {} if own is not None or "model_type" not in config else config
    values = JsonObject(dict(parsed if own is not None else legacy), FILE if own is not None else "config.json")
    # Both files may name BOS and EOS. All other rules are in generation_config.json where it exists.
    tokens = JsonObject({**config, **{key: value for key, value in parsed.items() if value is not None}}, FILE)
    rules = values if own is not None else JsonObject(dict(config), "config.json")
    first = lambda values, key: next(iter(_ids(values, key)), None)
    return GenerationDefaults(
        _choices(values),
        eos=_ids(tokens, "eos_token_id"),
        forced_eos=_ids(rules, "forced_eos_token_id"),
        suppressed=_ids(rules, "suppress_tokens"),
        begin_suppressed=_ids(rules, "begin_suppress_tokens"),
        forbidden=_sequences(rules, "bad_words_ids"),
        bos=first(tokens, "bos_token_id"),
        start=first(tokens, "decoder_start_token_id"),
        forced_bos=first(rules, "forced_bos_token_id"),
        ignored=_ignored(values),
    )


def _ids(values: JsonObject, key: str) -> tuple[int, ...]:
    """Returns the tokens of a key, without negative numbers, which mean none."""
    return tuple(token for token in values.integers(key) if token >= 0)


def _sequences(values: JsonObject, key: str) -> tuple[tuple[int, ...], ...]:
    rows = values.values.get(key)
    if rows is None:
        return ()
    is_valid = lambda row: isinstance(row, list) and row and all(type(token) is int and token >= 0 for token in row)
    if not (isinstance(rows, list) and all(map(is_valid, rows))):
        raise values.wrong(key, "a list of lists of token ids")
    return tuple(map(tuple, rows))


def _choices(values: JsonObject) -> dict[str, Any]:
    """Returns the fields of `Decoding` that the values set, checked by type and range."""
    sampled, beams = values.boolean("do_sample", False), values.integer("num_beams", 1, 1, MAX_TEXTS)
    early = values.values.get("early_stopping")
    if early not in (None, True, False, "never") or type(early) in (int, float):
        raise values.wrong("early_stopping", 'true, false or "never"')
    sampling = {
        "temperature": values.number("temperature", 1.0, 0.0, MAX_FLOAT / 2),
        "top_k": values.integer("top_k", TOP_K, 0, MAX_INT),
        "top_p": max(values.number("top_p", 1.0, 0.0, 1.0), 1e-6),  # 0 keeps only the most likely token, as this does
        "min_p": min(values.number("min_p", 0.0, 0.0, 1.0), 1 - 1e-6),
    }
    fields: dict[str, Any] = {
        "repetition_penalty": values.number("repetition_penalty", None, 1e-6, MAX_FLOAT / 2),
        "no_repeat_ngram_size": values.integer("no_repeat_ngram_size", None, 0, MAX_INT),
        "beams": beams,
        "length_penalty": values.number("length_penalty", None),
        "early_stopping": early,
        "n_best": values.integer("num_return_sequences", None, 1, MAX_TEXTS),
        "stop": values.texts("stop_strings") or None,
        "max_new_tokens": values.integer("max_new_tokens", None, 1, MAX_INT),
        "min_new_tokens": values.integer("min_new_tokens", None, 0, MAX_INT),
        "max_length": values.integer("max_length", None, 1, MAX_INT),
        "min_length": values.integer("min_length", None, 0, MAX_INT),
    }
    if not any(key in values for key in _CHOICES):
        return {}
    for new, whole in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if fields[new] is not None:  # takes precedence, as in transformers
            fields[whole] = None
    fields |= sampling if sampled and beams == 1 else {"temperature": 0.0}
    return {name: value for name, value in fields.items() if value is not None}


def _ignored(values: JsonObject) -> tuple[str, ...]:
    ignored = [key for key, neutral in _UNSUPPORTED.items() if key in values and values.values[key] not in neutral]
    both = values.boolean("do_sample", False) and values.integer("num_beams", 1) > 1
    return (*ignored, "do_sample together with num_beams") if both else tuple(ignored)


def defaults_of(lm: LM) -> GenerationDefaults:
    """Returns the generation settings of a model's files. Raises UserError as `read_defaults` does."""
    return read_defaults(lm.files.get(FILE), lm.origin.config if lm.origin else {})


def read_folder_defaults(folder: str | os.PathLike[str]) -> GenerationDefaults:
    """Returns the generation settings in a model's folder. Raises UserError as `read_defaults` does."""
    own, config = model_files.locate(folder, FILE), model_files.locate(folder, "config.json")
    return read_defaults(
        None if own is None else model_files.read_bytes(own), {} if config is None else model_files.read_object(config)
    )


def merge_settings(decoding: Decoding | None, given: Mapping[str, Any], defaults: GenerationDefaults) -> Decoding:
    """Returns the settings of generation.

    Args:
      decoding: settings that only `given` overrides; None: the defaults of the checkpoint.
      given: fields of `Decoding` by name.
      defaults: the checkpoint's; those that contradict `given` are dropped.

    Raises:
      UserError: a name that `Decoding` does not have.
    """
    fields = [field.name for field in dataclasses.fields(Decoding)]
    for name in given:
        if name not in fields:
            raise UserError(f"{name!r} is not a choice of generate{suggestion(name, fields)}")
    if decoding is not None:
        return dataclasses.replace(decoding, **given)
    alone = Decoding(**given)
    check_fields(alone)
    given = {name: getattr(alone, name) for name in given}
    return Decoding(**_without_conflicts(defaults.choices, given), **given)


def _without_conflicts(choices: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults that do not contradict the given settings."""
    left = {name: value for name, value in choices.items() if name not in given}
    for pair in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if any(name in given for name in pair):
            left = {name: value for name, value in left.items() if name not in pair}
    if "min_new_tokens" in left and "max_new_tokens" in given:
        left["min_new_tokens"] = min(left["min_new_tokens"], given["max_new_tokens"])
    sampled = given.get("temperature", 1) > 0 and any(name in given for name in _SAMPLING)
    if given.get("beams", 1) > 1:
        left = {name: value for name, value in left.items() if name not in _SAMPLING} | {"temperature": 0.0}
        left = {name: value for name, value in left.items() if name not in given}
    elif sampled:  # setting top_p means sampling, even if the checkpoint has beams or greedy decoding
        left = {name: value for name, value in left.items() if name != "beams"}
        left = left if left.get("temperature") else {n: v for n, v in left.items() if n != "temperature"}
    if "n_best" in left:
        both = {"beams": 1, "temperature": 1.0, **left, **given}
        max_texts = both["beams"] if both["beams"] > 1 else MAX_TEXTS if both["temperature"] > 0 else 1
        left["n_best"] = min(left["n_best"], max_texts)
    return left


def prediction_decoding(lm: LM) -> Decoding:
    """Returns the settings for predictions of an encoder-decoder: its checkpoint's, for one text without sampling."""
    defaults = defaults_of(lm)
    if not defaults.choices:
        return Decoding(temperature=0.0)
    report(lm, defaults)
    fields = {name: value for name, value in defaults.choices.items() if name not in (*_SAMPLING, "n_best")}
    # max_length and min_length include the start token of the decoder.
    max_length, min_length = fields.pop("max_length", 0), fields.pop("min_length", 0)
    if max_length:
        fields["max_new_tokens"] = max(1, min(max_length, lm.config.decoder_config.max_length) - 1)
    if min_length:
        fields["min_new_tokens"] = min(min_length - 1, fields.get("max_new_tokens", Decoding.max_new_tokens))
    return Decoding(temperature=0.0, **fields)


_REPORTED: WeakSet[LM] = WeakSet()


def report(lm: LM, defaults: GenerationDefaults) -> None:
    """Prints the lines of `describe_defaults` on stderr, once for each model."""
    if lm in _REPORTED:
        return
    _REPORTED.add(lm)
    for line in describe_defaults(defaults):
        print(line, file=sys.stderr)


def describe_defaults(defaults: GenerationDefaults) -> Iterable[str]:
    """Yields lines on the defaults that differ from `Decoding`, and on settings that are not supported."""
    plain = Decoding()
    changed = {name: value for name, value in defaults.choices.items() if value != getattr(plain, name)}
    if changed:
        shown = ", ".join(f"{name} {value}" for name, value in changed.items())
        yield f"decoding settings from the checkpoint's {FILE}: {shown}; your settings override them"
    if defaults.ignored:
        yield f"not supported: {', '.join(defaults.ignored)} of {FILE}; texts differ from those of transformers"
