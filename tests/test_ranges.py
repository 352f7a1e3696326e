"""Every field of every config has a range in its type, and any other value is refused with one message."""

from __future__ import annotations

import dataclasses
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import numpy as np
import pytest

from jaxlm import config as configs
from jaxlm.config import Decoding, MeshConfig, RunConfig, check_task, ranges
from jaxlm.errors import UserError

KINDS = {
    kind.__name__: kind
    for kind in vars(configs).values()
    if isinstance(kind, type) and issubclass(kind, ranges.Config) and kind not in (ranges.Config, configs.TaskConfig)
}
EXAMPLES = {  # configs with required fields
    "Part": lambda: configs.Part(configs.Classification(), configs.DataConfig(path="x")),
    "MultiTask": lambda: configs.MultiTask({"a": configs.Part(configs.Classification(), configs.DataConfig(path="x"))}),
}
FIELDS = [(name, field.name) for name, kind in KINDS.items() for field in dataclasses.fields(kind)]
DEEP: list = []
for _ in range(sys.getrecursionlimit() + 10):
    DEEP = [DEEP]
VALUES = {
    "NaN": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "minus one": -1,
    "minus a half": -0.5,
    "zero": 0,
    "a float": 2.5,
    "huge": 10**18,
    "thousands of digits": 10**5000,
    "a huge float": 1e308,
    "text": "seven",
    "empty text": "",
    "NUL": "a\0b",
    "a lone surrogate": "\ud800",
    "None": None,
    "true": True,
    "a path": Path("seven"),
    "a list": ["seven"],
    "an empty list": [],
    "nested": DEEP,
    "a dict": {"a": 1},
    "a class": RunConfig,
    "a fraction": Fraction(1, 2),
    "bytes": b"seven",
    "NumPy int": np.int64(3),
    "NumPy float": np.float32(0.5),
    "NumPy NaN": np.float64("nan"),
    "NumPy array": np.arange(3),
    "an object": object(),
}


def number_types(hint) -> list[tuple[type, list]]:
    """Returns the types of numbers in a type hint, each with its ranges."""
    if get_origin(hint) is Annotated:
        inner, *limits = get_args(hint)
        return [(inner, limits)] if inner in (int, float) else number_types(inner)
    if hint in (int, float):
        return [(hint, [])]
    return [found for part in get_args(hint) for found in number_types(part)]


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_a_field_of_numbers_has_a_range(name, field):
    for kind, limits in number_types(ranges.field_types(KINDS[name])[field]):
        assert any(isinstance(limit, ranges.Range) for limit in limits), f"{name}.{field}: {kind.__name__} has no Range"


def with_value(name: str, field: str, value: object) -> object:
    config = EXAMPLES[name]() if name in EXAMPLES else KINDS[name]()
    return dataclasses.replace(config, **{field: value})


@pytest.mark.parametrize("name", KINDS)
def test_a_field_accepts_its_values_and_refuses_all_others(name):
    """An accepted value has the type and the range of its field. Other values raise an error that names the field."""
    for field, hint in ranges.field_types(KINDS[name]).items():
        for kind, value in VALUES.items():
            config = with_value(name, field, value)
            try:
                ranges.check_fields(config, "here.")
            except UserError as error:
                message = str(error)
                assert message.startswith(f"here.{field} is ") and "; it must be " in message and len(message) < 700, (
                    kind,
                    message,
                )
                continue
            new_value = getattr(config, field)
            if hint is Any:  # a task, which `check_task` checks
                continue
            for number, limits in number_types(hint):
                if isinstance(new_value, (int, float)) and not isinstance(new_value, bool):
                    assert math.isfinite(new_value) and type(new_value) in (int, number), (field, kind, new_value)
                    assert all(limit.allows(new_value) for limit in limits if isinstance(limit, ranges.Range)), (
                        field,
                        kind,
                        new_value,
                    )
            assert not isinstance(new_value, (np.generic, Path, list)), (field, kind, new_value)
            if kind in ("NaN", "infinity", "minus infinity", "NumPy NaN", "an object", "thousands of digits"):
                raise AssertionError(f"{field} accepts {kind}")


@pytest.mark.parametrize(
    ("config", "value"),
    [
        (Decoding(max_new_tokens=np.int32(7)), "max_new_tokens=7"),
        (Decoding(temperature=np.float32(0.5)), "temperature=0.5"),
        (Decoding(stop=["a", "b"]), "stop=('a', 'b')"),
        (configs.DataConfig(path=Path("a") / "b"), "path='a/b'"),
        (configs.OptimizerConfig(rate=np.array(0.25)), "rate=0.25"),
        (RunConfig(dropout=np.float16(0.5)), "dropout=0.5"),
    ],
)
def test_values_of_numpy_and_pathlib_become_values_of_python(config, value):
    ranges.check_fields(config)
    assert value in repr(config)


MESSAGES = {
    "NaN": (dict(optimizer=configs.OptimizerConfig(warmup=math.nan)), "optimizer.warmup is nan; it must be a number"),
    "above": (
        dict(optimizer=configs.OptimizerConfig(beta1=2)),
        "optimizer.beta1 is 2; it must be at least 0 and below 1",
    ),
    "below": (dict(seed=-1), "seed is -1; it must be at least 0"),
    "a float": (dict(steps=1000.0), "steps is 1000.0; it must be an integer, at least 1"),
    "huge": (dict(batch=2**63), "batch is 9223372036854775808; it must be at least 1 and at most 2,147,483,647"),
    "special": (
        dict(mesh=MeshConfig(fsdp=0)),
        "mesh.fsdp is 0; it must be at least 1 and at most 1,000,000, or -1",
    ),
    "a dict": (dict(mesh={"data": 1}), "mesh is {'data': 1}; it must be of type MeshConfig"),
    "a text": (dict(data="corpus.txt"), "data is 'corpus.txt'; it must be of type DataConfig"),
    "a class": (
        dict(task=configs.CausalLM),
        "task is <class 'jaxlm.config.text_tasks.CausalLM'>; it must be the config of a task",
    ),
    "a pattern": (dict(data=configs.DataConfig(boundary="(")), "data.boundary is '('; it must be a valid regular"),
    "no column": (dict(task=configs.Classification(text=())), "task.text is (); it must be non-empty"),
    "a column without its tuple": (
        dict(task=configs.Classification(text="review")),
        "task.text is 'review'; it must be a non-empty tuple, each entry a non-empty string; "
        "perhaps you meant ('review',)",
    ),
    "nested": (
        dict(task=configs.Seq2Seq(decoding=Decoding(beams=0))),
        "task.decoding.beams is 0; it must be at least",
    ),
    "a choice": (dict(compute_dtype="float23"), "'float32', 'bfloat16'; perhaps you meant 'float32'"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_names_the_field_the_value_and_the_limit(name):
    fields, message = MESSAGES[name]
    with pytest.raises(UserError) as error:
        RunConfig(**fields).check()
    assert message in str(error.value)


def test_a_task_without_a_run_is_checked():
    with pytest.raises(UserError, match=r"task\.max_classes is 1; it must be at least 2"):
        check_task(configs.Classification(max_classes=1))


class Unshowable:
    def __repr__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    "value, text",
    [
        (10**5000, "an integer of 16,610 bits"),
        ([10**5000], "a list"),
        ({"a": (10**5000,)}, "a dict"),
        (Unshowable(), "a Unshowable"),
        ("x" * 99, "'" + "x" * 59),
        (DEEP, "a list"),
    ],
    ids=["integer", "list", "dict", "object", "text", "deep"],
)
def test_every_value_has_a_short_text(value, text):
    assert ranges.short_repr(value) == text
