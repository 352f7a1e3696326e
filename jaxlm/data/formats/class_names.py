"""Names of classes that a data set's own metadata gives to integers: `ClassLabel` of Hugging Face's datasets.

They stand in the schema of a parquet file, and for other files in `dataset_info.json` or in the head of `README.md`
beside them or one folder above.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import UserError

Names = dict[str, tuple[str, ...]]  # of a column, or an entry of one such as `answers.label`
_LARGEST = 1 << 24  # bytes of a metadata file that is read


def of_schema(metadata: dict[bytes, bytes] | None) -> Names:
    """Returns the names in the metadata of a parquet schema."""
    try:
        told = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        return of_features(told["info"]["features"])
    except (ValueError, RecursionError, TypeError, KeyError):
        return {}


def of_object(value: dict[str, Any]) -> Names:
    """Returns the names that a JSON object gives beside its rows: in `features`, or in `names` for the column label."""
    if found := of_features(value.get("features")):
        return found
    names = _names({"names": value.get("names")})
    return {"label": names} if names else {}


def beside(file: Path) -> Names:
    """Returns the names that the metadata files beside a file, or one folder above, give."""
    return next((found for folder in file.absolute().parents[:2] if (found := _of_folder(folder))), {})


@lru_cache(maxsize=64)
def _of_folder(folder: Path) -> Names:
    for name, read in (("dataset_info.json", json.loads), ("dataset_infos.json", json.loads), ("README.md", _card)):
        path = folder / name
        try:
            if not path.is_file() or path.stat().st_size > _LARGEST:
                continue
            told = read(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        several = told.values() if isinstance(told, dict) and "features" not in told else [told]
        for info in several:
            if isinstance(info, dict) and (found := of_features(info.get("features"))):
                return found
    return {}


def _card(text: str) -> Any:
    """What the head of a data set's card says, `dataset_info`: one, or the first of several."""
    import yaml

    if not text.startswith("---"):
        return {}
    try:
        head = yaml.safe_load(text.split("---", 2)[1])
    except yaml.YAMLError:
        return {}
    info = head.get("dataset_info") if isinstance(head, dict) else None
    info = info[0] if isinstance(info, list) and info else info
    return {"features": info.get("features")} if isinstance(info, dict) else {}


def of_features(features: Any, prefix: str = "") -> Names:
    """Returns the names in a description of features: as JSON has it, or as the head of a card has it."""
    if isinstance(features, list):  # a card: [{name: label, dtype: {class_label: {names: {"0": neg}}}}]
        features = {one.get("name"): one for one in features if isinstance(one, dict)}
    found: Names = {}
    for name, feature in features.items() if isinstance(features, dict) else ():
        inner = _inner(feature)
        if names := _names(inner):
            found[f"{prefix}{name}"] = names
        elif isinstance(inner, dict) and not str(inner.get("_type", "")).startswith("Value"):
            found |= of_features(
                {key: value for key, value in inner.items() if isinstance(value, (dict, list))}, f"{prefix}{name}."
            )
    return found


def _inner(feature: Any) -> Any:
    """What a list is of, through any number of lists."""
    for _ in range(8):
        if isinstance(feature, list) and len(feature) == 1:
            feature = feature[0]
            continue
        known = ("feature", "sequence", "list", "struct", "dtype") if isinstance(feature, dict) else ()
        inner = next((feature[key] for key in known if isinstance(feature.get(key), (dict, list))), None)
        if inner is None or "names" in feature:
            return feature
        feature = {one["name"]: one for one in inner if "name" in one} if _is_struct(inner) else inner
    return feature


def _is_struct(inner: Any) -> bool:
    return isinstance(inner, list) and bool(inner) and all(isinstance(one, dict) and "name" in one for one in inner)


def _names(feature: Any) -> tuple[str, ...]:
    feature = feature.get("class_label", feature) if isinstance(feature, dict) else {}
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, dict) and all(str(key).isdecimal() for key in names):
        names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not all(isinstance(name, (str, int, float)) for name in names):
        return ()
    found = tuple(map(str, names))
    return found if len(set(found)) == len(found) else ()


def named(row: Row, names: Names, place: Place) -> Row:
    """Returns a row with the names in place of the integers; -1, which stands for no label, becomes None.

    Raises:
      UserError: for an integer without a name.
    """
    for column, classes in names.items():
        first, *rest = column.split(".")
        if first in row:
            row[first] = _named(row[first], rest, classes, column, place)
    return row


def _named(value: Any, path: list[str], classes: tuple[str, ...], column: str, place: Place) -> Any:
    if path and isinstance(value, dict):
        rest = {path[0]: _named(value[path[0]], path[1:], classes, column, place)} if path[0] in value else {}
        return {**value, **rest}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict)):
        return [_named(item, path, classes, column, place) for item in value]
    digits = isinstance(value, str) and value not in classes and re.fullmatch(r"-?\d{1,9}", value.strip())
    if digits or (isinstance(value, float) and value.is_integer()):  # of a table; of integers beside missing ones
        value = int(value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return value
    number = value.__index__()
    if not -1 <= number < len(classes):
        raise UserError(
            f"{place}: column {column!r} holds {number}, and the data set's metadata names {len(classes)} classes "
            f"({', '.join(classes[:5])}{' ...' * (len(classes) > 5)}); correct the row or the metadata"
        )
    return None if number < 0 else classes[number]
