"""Parquet files, read in batches of rows.

Only the columns that a task reads are read, where the file has them all.  Values that Python has no type for, such as a
date of the year 10000 or nanoseconds, become the text that Arrow prints; decimals and durations become numbers.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from jaxlm.data.formats import class_names
from jaxlm.data.formats.lines import Place, Row, other_kind
from jaxlm.errors import UserError

_ROWS = 1024  # in a batch


def rows(
    file: Path, stream: IO[bytes], needed: tuple[str, ...], optional: tuple[str, ...], with_names: bool
) -> Iterator[tuple[Place, Row]]:
    """Yields each row with its number.

    Args:
      file: the file's name.
      stream: its bytes.
      needed: the columns, or entries of some such as `translation.de`, that are read; () for all.
      optional: those that are read if they are there.
      with_names: whether integers become the names that the schema's metadata gives them.

    Raises:
      UserError: for a file that cannot be read, with the column where one is at fault.
    """
    import pyarrow
    import pyarrow.parquet

    if not stream.seekable() or file.suffix.lower() != ".parquet":
        stream = io.BytesIO(stream.read())  # the table of contents stands at the end
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        schema = table.schema_arrow
        complete = needed and all(_tops(schema.names, (name,)) for name in needed)
        tops = _tops(schema.names, (*needed, *optional)) if complete else None
        if twice := next((name for name in tops or schema.names if schema.names.count(name) > 1), ""):
            raise UserError(f"{file} has the column {twice!r} twice; rename one of them, or leave it out")
        names = class_names.of_schema(schema.metadata) or class_names.beside(file) if with_names else {}
        for batch in table.iter_batches(batch_size=_ROWS, columns=tops):
            columns = {name: _values(file, name, batch.column(n)) for n, name in enumerate(batch.schema.names)}
            for cells in zip(*columns.values()) if columns else [()] * batch.num_rows:
                number += 1
                place = Place(str(file), number)
                yield place, class_names.named(dict(zip(columns, cells)), names, place)
    except (pyarrow.ArrowException, OSError) as error:
        stream.seek(0)
        first = stream.read(512)
        if not first.startswith(b"PAR1") and (found := other_kind(first)):
            raise UserError(f"{file} is {found}") from None
        column = _unreadable(stream)
        if column:
            raise UserError(
                f"{file}: column {column!r} cannot be read ({error!s:.200}); write it again, or leave it out"
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        after = f" behind row {number}" if number else ""
        raise UserError(f"{file} is no readable parquet file{after} ({reason:.200}); write it again") from None


def _unreadable(stream: IO[bytes]) -> str:
    """The first column that cannot be read alone; "" where it is not one column that is at fault."""
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


def _tops(names: list[str], wanted: tuple[str, ...]) -> list[str]:
    """The columns that are wanted, or of which an entry is."""
    return [name for name in names if any(one == name or one.startswith(f"{name}.") for one in wanted)]


def _values(file: Path, name: str, column: Any) -> list[Any]:
    """The values of a column; text that is not UTF-8 holds lone surrogates."""
    import pyarrow

    error: Exception | None = None
    for as_text in (False, True):
        try:
            plain = _plain_type(column.type, as_text)
            return (column if plain.equals(column.type) else column.cast(plain)).to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError, TypeError, KeyError) as reason:  # KeyError: of zones
            error = reason
    raise UserError(
        f"{file}: column {name!r} of type {column.type} cannot be read ({error!s:.100}); write it as text, or "
        f"leave it out"
    )


def _plain_type(kind: Any, as_text: bool) -> Any:
    """The type as which the values of an Arrow type have a Python type: bytes for text; text for dates, if asked."""
    import pyarrow
    from pyarrow import types

    plain = partial(_plain_type, as_text=as_text)
    if types.is_string(kind):
        return pyarrow.binary()  # decoded with the row: to_pylist() cannot say where text is not UTF-8
    if types.is_large_string(kind) or types.is_string_view(kind):
        return pyarrow.large_binary()
    if types.is_dictionary(kind):
        return plain(kind.value_type)
    # Python's dates have no nanoseconds, and end with the year 9999.
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
