"""What a checkpoint says of generation: its `generation_config.json`, or where it has none, its `config.json`.

Its choices are the defaults of `generate`, as in transformers; what the caller gives takes their place.  A file that
names a choice but not `do_sample` asks for greedy texts, as there.  A file that names none leaves `Decoding` as it is.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

from jaxlm.config import MOST_TEXTS, Decoding
from jaxlm.config.ranges import LARGE, MOST, check_fields
from jaxlm.errors import UserError, perhaps
from jaxlm.hub import model_files
from jaxlm.hub.model_files import JsonObject

if TYPE_CHECKING:
    from jaxlm.lm import LM

FILE = "generation_config.json"
_DRAWS = ("temperature", "top_k", "top_p", "min_p")  # fields of `Decoding` for sampling alone
TOP_K = 50  # of transformers, where a file asks for sampling and does not name it
_CHOICES = (
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("num_beams", "length_penalty", "early_stopping", "num_return_sequences", "stop_strings"),
    *("max_new_tokens", "min_new_tokens", "max_length", "min_length"),
)
# Keys that change the text and are not computed here -> the values with which they change nothing.
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
    """What the files of a checkpoint say of generation.

    choices: fields of `Decoding`.  eos, forced_eos, suppressed, begin_suppressed: tokens that end a text, one of which
    must end the longest text, that never come, and that are not the first.  forbidden: sequences that never come.
    bos, start, forced_bos: the token before a text, before that of a decoder with an encoder, and the first of a text.
    ignored: keys that change the text in transformers and not here.
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
        own: the content of its generation_config.json, where it has one.
        config: the values of its config.json, which older checkpoints have their choices in.

    Raises:
        UserError: a value is of another type or out of its range.
    """
    said: dict[str, Any] = {} if own is None else model_files.parse_object(own, FILE)
    # Without a model_type it is jaxlm's own file, where a max_length is that of the model.
    legacy = {} if own is not None or "model_type" not in config else config
    values = JsonObject(dict(said if own is not None else legacy), FILE if own is not None else "config.json")
    # Either file names the tokens that begin and end texts; generation_config.json, where it exists, all other rules.
    tokens = JsonObject({**config, **{key: value for key, value in said.items() if value is not None}}, FILE)
    rules = values if own is not None else JsonObject(dict(config), "config.json")
    one = lambda given, key: next(iter(_ids(given, key)), None)
    return GenerationDefaults(
        _choices(values),
        eos=_ids(tokens, "eos_token_id"),
        forced_eos=_ids(rules, "forced_eos_token_id"),
        suppressed=_ids(rules, "suppress_tokens"),
        begin_suppressed=_ids(rules, "begin_suppress_tokens"),
        forbidden=_sequences(rules, "bad_words_ids"),
        bos=one(tokens, "bos_token_id"),
        start=one(tokens, "decoder_start_token_id"),
        forced_bos=one(rules, "forced_bos_token_id"),
        ignored=_ignored(values),
    )


def _ids(values: JsonObject, key: str) -> tuple[int, ...]:
    """The tokens of a key; negative numbers stand for none."""
    return tuple(token for token in values.integers(key) if token >= 0)


def _sequences(values: JsonObject, key: str) -> tuple[tuple[int, ...], ...]:
    given = values.values.get(key)
    listed = given if isinstance(given, list) else []
    whole = lambda row: isinstance(row, list) and row and all(type(token) is int and token >= 0 for token in row)
    if given is not None and not (isinstance(given, list) and all(map(whole, listed))):
        raise values.wrong(key, "a list of lists of token ids")
    return tuple(map(tuple, listed))


def _choices(values: JsonObject) -> dict[str, Any]:
    """The fields of `Decoding` that the values give, each checked by type and range; none where they name no choice."""
    sampled, beams = values.boolean("do_sample", False), values.integer("num_beams", 1, 1, MOST_TEXTS)
    early = values.values.get("early_stopping")
    if early not in (None, True, False, "never") or type(early) in (int, float):
        raise values.wrong("early_stopping", 'true, false or "never"')
    drawn = {
        "temperature": values.number("temperature", 1.0, 0.0, LARGE / 2),
        "top_k": values.integer("top_k", TOP_K, 0, MOST),
        "top_p": max(values.number("top_p", 1.0, 0.0, 1.0), 1e-6),  # 0 leaves the likeliest token, as does this
        "min_p": min(values.number("min_p", 0.0, 0.0, 1.0), 1 - 1e-6),
    }
    found: dict[str, Any] = {
        "repetition_penalty": values.number("repetition_penalty", None, 1e-6, LARGE / 2),
        "no_repeat_ngram_size": values.integer("no_repeat_ngram_size", None, 0, MOST),
        "beams": beams,
        "length_penalty": values.number("length_penalty", None),
        "early_stopping": early,
        "n_best": values.integer("num_return_sequences", None, 1, MOST_TEXTS),
        "stop": values.texts("stop_strings") or None,
        "max_new_tokens": values.integer("max_new_tokens", None, 1, MOST),
        "min_new_tokens": values.integer("min_new_tokens", None, 0, MOST),
        "max_length": values.integer("max_length", None, 1, MOST),
        "min_length": values.integer("min_length", None, 0, MOST),
    }
    if not any(key in values for key in _CHOICES):
        return {}
    for new, whole in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if found[new] is not None:  # takes precedence, as in transformers
            found[whole] = None
    found |= drawn if sampled and beams == 1 else {"temperature": 0.0}
    return {name: value for name, value in found.items() if value is not None}


def _ignored(values: JsonObject) -> tuple[str, ...]:
    found = [key for key, neutral in _UNSUPPORTED.items() if key in values and values.values[key] not in neutral]
    both = values.boolean("do_sample", False) and values.integer("num_beams", 1) > 1
    return (*found, "do_sample together with num_beams") if both else tuple(found)


def defaults_of(lm: LM) -> GenerationDefaults:
    """Returns what the files of a model say of generation.  Raises UserError as `read_defaults` does."""
    return read_defaults(lm.files.get(FILE), lm.origin.config if lm.origin else {})


def defaults_in(folder: str | os.PathLike[str]) -> GenerationDefaults:
    """Returns what the files of a model's folder say of generation.  Raises UserError as `read_defaults` does."""
    own, config = model_files.locate(folder, FILE), model_files.locate(folder, "config.json")
    return read_defaults(
        None if own is None else model_files.read_bytes(own), {} if config is None else model_files.read_object(config)
    )


def chosen(decoding: Decoding | None, given: Mapping[str, Any], defaults: GenerationDefaults) -> Decoding:
    """Returns how texts are generated.

    Args:
        decoding: used as it is, but for what is given; None: the defaults of the checkpoint.
        given: fields by name.

    Raises:
        UserError: a name that `Decoding` does not have.
    """
    fields = [field.name for field in dataclasses.fields(Decoding)]
    for name in given:
        if name not in fields:
            raise UserError(f"{name!r} is not a choice of generate{perhaps(name, fields)}")
    if decoding is not None:
        return dataclasses.replace(decoding, **given)
    alone = Decoding(**given)
    check_fields(alone)
    given = {name: getattr(alone, name) for name in given}
    return Decoding(**_beside(defaults.choices, given), **given)


def _beside(choices: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that do not contradict what is given."""
    left = {name: value for name, value in choices.items() if name not in given}
    for pair in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if any(name in given for name in pair):
            left = {name: value for name, value in left.items() if name not in pair}
    if "min_new_tokens" in left and "max_new_tokens" in given:
        left["min_new_tokens"] = min(left["min_new_tokens"], given["max_new_tokens"])
    draws = given.get("temperature", 1) > 0 and any(name in given for name in _DRAWS)
    if given.get("beams", 1) > 1:
        left = {name: value for name, value in left.items() if name not in _DRAWS} | {"temperature": 0.0}
        left = {name: value for name, value in left.items() if name not in given}
    elif draws:  # to ask for a top_p is to ask for draws, also where the checkpoint has beams or greedy texts
        left = {name: value for name, value in left.items() if name != "beams"}
        left = left if left.get("temperature") else {n: v for n, v in left.items() if n != "temperature"}
    if "n_best" in left:
        both = {"beams": 1, "temperature": 1.0, **left, **given}
        most = both["beams"] if both["beams"] > 1 else MOST_TEXTS if both["temperature"] > 0 else 1
        left["n_best"] = min(left["n_best"], most)
    return left


def written_by(lm: LM) -> Decoding:
    """Returns how an encoder-decoder writes its predictions: as its checkpoint says, but one each, without draws."""
    defaults = defaults_of(lm)
    if not defaults.choices:
        return Decoding(temperature=0.0)
    report(lm, defaults)
    kept = {name: value for name, value in defaults.choices.items() if name not in (*_DRAWS, "n_best")}
    # The one token that the decoder begins with counts in the lengths of the whole.
    most, least = kept.pop("max_length", 0), kept.pop("min_length", 0)
    if most:
        kept["max_new_tokens"] = max(1, min(most, lm.config.max_length) - 1)
    if least:
        kept["min_new_tokens"] = min(least - 1, kept.get("max_new_tokens", Decoding.max_new_tokens))
    return Decoding(temperature=0.0, **kept)


_REPORTED: WeakSet[LM] = WeakSet()


def report(lm: LM, defaults: GenerationDefaults) -> None:
    """Prints once for a model, on stderr, which of its defaults are used, and what its file asks for in vain."""
    if lm in _REPORTED:
        return
    _REPORTED.add(lm)
    for line in lines(defaults):
        print(line, file=sys.stderr)


def lines(defaults: GenerationDefaults) -> Iterable[str]:
    """Returns the lines that `report` prints."""
    plain = Decoding()
    told = {name: value for name, value in defaults.choices.items() if value != getattr(plain, name)}
    if told:
        shown = ", ".join(f"{name} {value}" for name, value in told.items())
        yield f"decoding by the checkpoint's {FILE}: {shown}; what you give takes the place of it"
    if defaults.ignored:
        yield f"not supported, so that texts differ from transformers': {', '.join(defaults.ignored)} of {FILE}"
