"""tensorflow-datasets without TensorFlow: data sets by name, and folders that were prepared elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxlm.data.formats import class_names
from jaxlm.data.formats.lines import Place, Row
from jaxlm.errors import RunError, UserError, perhaps

_PREPARE = (
    "prepare it on a machine with TensorFlow, tfds.builder(NAME, file_format='array_record').download_and_prepare(), "
    "copy the folder that holds its dataset_info.json, and give that folder as --data.path"
)


def is_tfds(path: str) -> bool:
    """Whether a path is a tfds data set: a name, or the folder of a prepared one, which has splits."""
    return path.startswith("tfds:") or all(
        os.path.isfile(os.path.join(path, name)) for name in ("dataset_info.json", "features.json")
    )


@contextmanager
def _without_tensorflow(path: str) -> Iterator[None]:
    """tfds imports TensorFlow where it cannot do without; the user is told that, not the name of a module."""
    try:
        yield
    except ImportError as error:
        if not (error.name or "").startswith("tensorflow"):
            raise
        raise UserError(f"{path} needs TensorFlow, which jaxlm does without; {_PREPARE}") from None


def rows(path: str, split: str, with_names: bool) -> Iterator[tuple[Place, Row]]:
    """Yields every row of a split with its place, integers as the names of their classes `with_names`."""
    builder = opened(path)
    with _without_tensorflow(path):
        if path.startswith("tfds:") and not builder.is_prepared():
            try:
                builder.download_and_prepare()
            except (OSError, RuntimeError) as error:
                raise RunError(f"{path} could not be downloaded ({error}); try again, or {_PREPARE}") from error
        names = re.findall(r"[A-Za-z_][\w.-]*(?=\[|\+|$)", split)  # of "train[:10%]+test": train, test
        for name in names or [split]:
            if name not in builder.info.splits and name != "all":
                raise UserError(f"{path} has no split {name!r}{perhaps(name, builder.info.splits)}; set --data.split")
        try:
            source = builder.as_data_source(split)
        except (NotImplementedError, ValueError) as error:
            raise UserError(f"split {split!r} of {path} cannot be read ({_first_line(error)}); {_PREPARE}") from None
        of_classes = _class_names(builder.info.features) if with_names else {}
        for number in range(len(source)):
            place = Place(path, number + 1)
            yield place, class_names.named(dict(source[number]), of_classes, place)


def _class_names(features: Any, prefix: str = "") -> class_names.Names:
    """The names that the features of a data set give to integers."""
    found: class_names.Names = {}
    for name, feature in features.items() if hasattr(features, "items") else ():
        feature = getattr(feature, "feature", feature)  # of a sequence
        if names := getattr(feature, "names", None):
            found[f"{prefix}{name}"] = tuple(names)
        else:
            found |= _class_names(feature, f"{prefix}{name}.")
    return found


def opened(path: str) -> Any:
    """The builder of a data set.  Raises UserError where there is none, or where it needs TensorFlow."""
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
                raise UserError(f"{path} needs TensorFlow, which jaxlm does without; {_PREPARE}") from None
            hint = perhaps(base, tfds.list_builders(with_community_datasets=False))
            raise UserError(f"tfds has no data set {base!r}{hint}") from None
        except (ValueError, AssertionError) as error:  # of a config or version that there is not
            raise UserError(f"{path} cannot be opened: {_first_line(error)}; set --data.path") from None


def _defines(name: str) -> bool:
    """Whether tfds has a module with this data set: one that needs TensorFlow is left out of its own list."""
    import tensorflow_datasets as tfds

    definition = re.compile(rf"^class {''.join(word.capitalize() for word in name.split('_'))}\(", re.MULTILINE)
    modules: Iterable[Path] = Path(tfds.__file__).parent.rglob("*.py")
    return any(definition.search(module.read_text(encoding="utf-8", errors="replace")) for module in modules)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
