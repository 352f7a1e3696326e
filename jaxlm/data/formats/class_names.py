"""Class names for integer labels from the metadata of a data set (`ClassLabel` of the library datasets).

They are in the schema of a parquet file. For other files they are in `dataset_info.json` or in the front matter of
`README.md`, in the same folder or the folder above.
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

Names = dict[str, tuple[str, ...]]  # column, or entry of one such as `answers.label` -> class names
_MAX_BYTES = 1 << 24  # size of the largest metadata file that is read


def of_schema(metadata: dict[bytes, bytes] | None) -> Names:
    """Returns the class names in the metadata of a parquet schema."""
    try:
        info = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        return of_features(info["info"]["features"])
    except (ValueError, RecursionError, TypeError, KeyError):
        return {}


def of_object(value: dict[str, Any]) -> Names:
    """Returns the class names in a JSON object with rows: in `features`, or in `names` for the column label."""
    if found := of_features(value.get("features")):
        return found
    names = _names({"names": value.get("names")})
    return {"label": names} if names else {}


def of_file(file: Path) -> Names:
    """Returns the class names in the metadata files in the folder of a file, or in the folder above."""
    return next((found for folder in file.absolute().parents[:2] if (found := _of_folder(folder))), {})


@lru_cache(maxsize=64)
def _of_folder(folder: Path) -> Names:
    for name, read in (("dataset_info.json", json.loads), ("dataset_infos.json", json.loads), ("README.md", _card)):
        path = folder / name
        try:
            if not path.is_file() or path.stat().st_size > _MAX_BYTES:
                continue
            content = read(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        infos = content.values() if isinstance(content, dict) and "features" not in content else [content]
        for info in infos:
            if isinstance(info, dict) and (found := of_features(info.get("features"))):
                return found
    return {}


def _card(text: str) -> Any:
    """Returns `dataset_info` from the front matter of a dataset card, or the first one if there are several."""
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
    """Returns the class names in a description of features, in the form of JSON or of a dataset card."""
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
    """Returns the feature of the items, if a feature is a list (of lists)."""
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


def substitute(row: Row, names: Names, place: Place) -> Row:
    """Replaces integers by class names in a row, in place, and returns it; -1, which means no label, becomes None.

    Raises:
      UserError: with the place, for an integer without a class name.
    """
    for column, classes in names.items():
        first, *rest = column.split(".")
        if first in row:
            row[first] = _substitute(row[first], rest, classes, column, place)
    return row


def _substitute(value: Any, path: list[str], classes: tuple[str, ...], column: str, place: Place) -> Any:
    if path and isinstance(value, dict):
        rest = {path[0]: _substitute(value[path[0]], path[1:], classes, column, place)} if path[0] in value else {}
        return {**value, **rest}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict)):
        return [_substitute(item, path, classes, column, place) for item in value]
    digits = isinstance(value, str) and value not in classes and re.fullmatch(r"-?\d{1,9}", value.strip())
    # Tables contain integers as text, and columns with missing values contain them as floats.
    if digits or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return value
    number = value.__index__()
    if not -1 <= number < len(classes):
        raise UserError(
            f"{place}: column {column!r} contains {number}, but the metadata of the data set has {len(classes)} "
            f"classes ({', '.join(classes[:5])}{' ...' * (len(classes) > 5)}); correct the row or the metadata"
        )
    return None if number < 0 else classes[number]
