"""Reads tensorflow-datasets without TensorFlow: data sets by name, and folders prepared on another machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlm.data.formats import class_names
from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import RunError, UserError, suggestion

_PREPARE = (
    "prepare it on a machine with TensorFlow, tfds.builder(NAME, file_format='array_record').download_and_prepare(), "
    "copy the folder that contains its dataset_info.json, and set --data.path to this folder"
)


def is_tfds(path: str) -> bool:
    """Returns whether a path is a tfds data set: its name, or the folder of a prepared data set."""
    return path.startswith("tfds:") or all(
        os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "features.json")
    )


@contextmanager
def _without_tensorflow(path: str) -> Iterator[None]:
    """Turns tfds's error about a missing module of TensorFlow into a message with a remedy."""
    try:
        yield
    except ImportError as error:
        if not (error.name or "").startswith("tensorflow"):
            raise
        raise UserError(f"{path} requires TensorFlow, which jaxlm does not use; {_PREPARE}") from None


def rows(path: str, split: str, with_names: bool) -> Iterator[tuple[Place, Row]]:
    """Yields every row of a split with its place.

    Args:
      path: `tfds:NAME`, or the folder of a prepared data set.
      split: a split in the notation of tfds, such as `train[:10%]+test`.
      with_names: whether integers are replaced by class names.

    Raises:
      UserError: the data set or the split does not exist, or requires TensorFlow.
      RunError: the download failed.
    """
    builder = open_builder(path)
    with _without_tensorflow(path):
        if path.startswith("tfds:") and not builder.is_prepared():
            try:
                builder.download_and_prepare()
            except (OSError, RuntimeError) as error:
                raise RunError(f"{path} could not be downloaded ({error}); try again, or {_PREPARE}") from error
        names = re.findall(r"[A-Za-z_][\w.-]*(?=\[|\+|$)", split)  # "train[:10%]+test": train, test
        for name in names or [split]:
            if name not in builder.info.splits and name != "all":
                raise UserError(
                    f"{path} has no split {name!r}{suggestion(name, builder.info.splits)}; set --data.split"
                )
        try:
            source = builder.as_data_source(split)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"split {split!r} of {path} cannot be read ({_first_line(error)}); {_PREPARE}") from None
        classes = _class_names(builder.info.features) if with_names else {}
        for number in range(len(source)):
            place = Place(path, number + 1)
            yield place, class_names.substitute(dict(source[number]), classes, place)


def _class_names(features: Any, prefix: str = "") -> class_names.Names:
    """Returns the class names in the features of a data set."""
    found: class_names.Names = {}
    for name, feature in features.items() if hasattr(features, "items") else ():
        feature = getattr(feature, "feature", feature)  # the feature of the items, if it is a sequence
        if names := getattr(feature, "names", None):
            found[f"{prefix}{name}"] = tuple(names)
        else:
            found |= _class_names(feature, f"{prefix}{name}.")
    return found


def open_builder(path: str) -> Any:
    """Returns the tfds builder of a data set.

    Raises:
      UserError: the data set does not exist or requires TensorFlow.
    """
    import tensorflow_datasets as tfds

    with _without_tensorflow(path):
        if not path.startswith("tfds:"):
            return tfds.builder_from_directory(path)
        name = path.removeprefix("tfds:")
        base = re.split("[/:]", name)[0]
        try:
            return tfds.builder(name, file_format="array_record")
        except tfds.core.DatasetNotFoundError:
            if _defines(base):
                raise UserError(f"{path} requires TensorFlow, which jaxlm does not use; {_PREPARE}") from None
            hint = suggestion(base, tfds.list_builders(with_community_datasets=False))
            raise UserError(f"tfds has no data set {base!r}{hint}") from None
        except (ValueError, AssertionError) as error:  # an unknown config or version
            raise UserError(f"{path} cannot be opened: {_first_line(error)}; set --data.path") from None


def _defines(name: str) -> bool:
    """Returns whether a module of tfds defines this data set; tfds does not list data sets that require TensorFlow."""
    import tensorflow_datasets as tfds

    definition = re.compile(rf"^class {''.join(word.capitalize() for word in name.split('_'))}\(", re.MULTILINE)
    modules: Iterable[Path] = Path(tfds.__file__).parent.rglob("*.py")
    return any(definition.search(module.read_text(encoding="utf-8", errors="replace")) for module in modules)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
