"""Reads Parquet files in batches of rows.

If the file has all columns that a task requires, only the columns of the task are read. Values for which Python has no
type, such as dates after the year 9999 or nanoseconds, become text as printed by Arrow. Decimals and durations become
numbers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from jaxlm.data.formats import class_names
from jaxlm.data.formats.lines import Place, Row, binary_format
from jaxlm.errors import UserError

_ROWS = 1024  # per batch


def rows(
    file: Path, stream: IO[bytes], needed: tuple[str, ...], optional: tuple[str, ...], with_names: bool
) -> Iterator[tuple[Place, Row]]:
    """Yields each row with its number as the place.

    Args:
      file: the name of the file.
      stream: the contents of the file.
      needed: the required columns, or entries of columns such as `translation.de`; () for all.
      optional: columns that are read if they exist.
      with_names: whether integers are replaced by the class names in the metadata of the schema.

    Raises:
      UserError: the file cannot be read. The message names the column if the error is in a single one.
    """
    import pyarrow
    import pyarrow.parquet

    if not stream.seekable() or file.suffix.lower() != ".parquet":
        stream = io.BytesIO(stream.read())  # random access is needed, because the metadata is at the end of the file
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        schema = table.schema_arrow
        complete = needed and all(_select(schema.names, (name,)) for name in needed)
        selected = _select(schema.names, (*needed, *optional)) if complete else None
        if twice := next((name for name in selected or schema.names if schema.names.count(name) > 1), ""):
            raise UserError(f"{file} has the column {twice!r} twice; rename or remove one of them")
        names = class_names.of_schema(schema.metadata) or class_names.of_file(file) if with_names else {}
        for batch in table.iter_batches(batch_size=_ROWS, columns=selected):
            columns = {name: _values(file, name, batch.column(n)) for n, name in enumerate(batch.schema.names)}
            for cells in zip(*columns.values()) if columns else [()] * batch.num_rows:
                number += 1
                place = Place(str(file), number)
                yield place, class_names.substitute(dict(zip(columns, cells)), names, place)
    except (pyarrow.ArrowException, OSError) as error:
        stream.seek(0)
        first = stream.read(512)
        if not first.startswith(b"PAR1") and (found := binary_format(first)):
            raise UserError(f"{file} is {found}") from None
        column = _unreadable_column(stream)
        if column:
            raise UserError(
                f"{file}: column {column!r} cannot be read ({error!s:.200}); write it again or remove it"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        after = f" after row {number}" if number else ""
        raise UserError(f"{file} is not a readable parquet file{after} ({reason:.200}); write it again") from None


def _unreadable_column(stream: IO[bytes]) -> str:
    """Returns the first column that cannot be read on its own; "" if the error is not in a single column."""
    import pyarrow
    import pyarrow.parquet

    name = ""
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        for name in table.schema_arrow.names:
            for _ in table.iter_batches(batch_size=_ROWS, columns=[name]):
                pass
    except (pyarrow.ArrowException, OSError):
        return name
    return ""


def _select(names: list[str], requested: tuple[str, ...]) -> list[str]:
    """Returns the columns that are requested as a whole or by an entry."""
    return [name for name in names if any(one == name or one.startswith(f"{name}.") for one in requested)]


def _values(file: Path, name: str, column: Any) -> list[Any]:
    """Returns the values of a column; text is returned as bytes."""
    import pyarrow

    error: Exception | None = None
    for as_text in (False, True):
        try:
            plain = _plain_type(column.type, as_text)
            return (column if plain.equals(column.type) else column.cast(plain)).to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError, TypeError, KeyError) as reason:  # KeyError: zones
            error = reason
    raise UserError(
        f"{file}: column {name!r} of type {column.type} cannot be read ({error!s:.100}); write it as text or remove it"
    )


def _plain_type(kind: Any, as_text: bool) -> Any:
    """Returns an Arrow type that converts to Python values: bytes for text, and text for dates if `as_text`."""
    import pyarrow
    from pyarrow import types

    plain = partial(_plain_type, as_text=as_text)
    if types.is_string(kind):
        return pyarrow.binary()  # decoded with the row, because to_pylist() does not locate text that is not UTF-8
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pyarrow.large_binary()
    if types.is_dictionary(kind):
        return plain(kind.value_type)
    # Python's dates have no nanoseconds and end with the year 9999.
    nanoseconds = (types.is_timestamp(kind) or types.is_time64(kind)) and kind.unit == "ns"
    if nanoseconds or (as_text and types.is_temporal(kind) and not types.is_duration(kind)):
        return pyarrow.string()
    if types.is_duration(kind):
        return pyarrow.int64()
    if types.is_decimal(kind):
        return pyarrow.float64()
    if types.is_map(kind):
        return pyarrow.map_(plain(kind.key_type), plain(kind.item_type))
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(plain(kind.value_type), kind.list_size)
    if types.is_large_list(kind):
        return pyarrow.large_list(plain(kind.value_type))
    if types.is_list(kind):
        return pyarrow.list_(plain(kind.value_type))
    if types.is_struct(kind):
        fields = [kind.field(n) for n in range(kind.num_fields)]
        return pyarrow.struct([field.with_type(plain(field.type)) for field in fields])
    return kind
