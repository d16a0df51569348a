"""Read documents from one column of strings in a Parquet file, row group by row group."""

import contextlib
from collections.abc import Iterator
from typing import Any

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.text.compression import DamagedStream
from gpt2_flax.text.documents import Faults, Texts, in_slices
from gpt2_flax.text.encodings import BLOCK_BYTES, Bad
from gpt2_flax.text.files import open_file

MOST_ROWS = 2**12  # read at once; fewer if the rows are long


def check_parquet_installed() -> None:
    """Raise `UserError` (NO_INPUT) if the package that reads Parquet is missing."""
    try:
        from pyarrow import parquet  # noqa: F401
    except ImportError:
        fix = "install it with: pip install 'gpt2_flax[corpora]'"
        raise UserError(ExitCode.NO_INPUT, "package missing for .parquet files", "pyarrow", fix) from None


def row_groups(path: str) -> list[int]:
    """Return the number of rows in each row group. Raises `OSError`, or `DamagedStream` if the file is damaged."""
    with _opened(path) as file:
        return [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]


def parquet_documents(
    path: str, start: int, stop: int | None, field: str, faults: Faults
) -> Iterator[tuple[Texts, float]]:
    """Yield the texts of the row groups from `start` up to `stop`, with the share of their rows read so far.

    Raises:
        OSError: the file cannot be read.
        UserError: DATA if `field` is not a column of strings.
    """
    before = row = 0
    try:
        with _opened(path) as file:
            names = _column(file.schema_arrow, field, path)
            groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)[start:stop]]
            n_rows = sum(group.num_rows for group in groups)
            for index, group in enumerate(groups, start):
                row = before
                try:
                    for values in _values(file, index, _rows_at_once(group, field), field, names):
                        texts = [_text(value, number, field, faults) for number, value in enumerate(values, row)]
                        row += len(values)
                        for some in in_slices([text for text in texts if text]):
                            yield some, row / n_rows
                except DamagedStream as damage:
                    faults.leave_out(Bad(row, str(damage)))
                before += group.num_rows
    except DamagedStream as damage:
        faults.leave_out(Bad(row, str(damage)))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Open a `pyarrow.parquet.ParquetFile`; raises as `row_groups`."""
    from pyarrow import parquet

    with open_file(path) as stream:
        with _damage():
            file = parquet.ParquetFile(
                stream, pre_buffer=False, buffer_size=BLOCK_BYTES, page_checksum_verification=True
            )
        yield file


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turn pyarrow's errors about the content of a file into `DamagedStream`."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from the operating system
        raise DamagedStream(f"damaged Parquet file ({quote(str(error))})") from None


def _column(schema: Any, field: str, path: str) -> list[str]:
    """Return the names that lead to the column, outermost first; a name that itself holds the dots has precedence."""
    import pyarrow
    from pyarrow import types

    names: list[str] = []
    kind, dot, rest = pyarrow.struct(list(schema)), ".", field
    while dot:
        known = {kind.field(index).name for index in range(kind.num_fields)} if types.is_struct(kind) else set()
        name, dot, rest = (rest, "", "") if rest in known else rest.partition(".")
        if name not in known:
            what = f"no column {quote(field)}"
            fix = f"choose another --field; it has {quote(', '.join(schema.names), 200)}"
            raise UserError(ExitCode.DATA, what, path, fix)
        kind = kind.field(kind.get_all_field_indices(name)[0]).type
        names.append(name)
    values = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(values) or types.is_large_string(values) or types.is_string_view(values)):
        what = f"column {quote(field)} holds {kind}, not strings"
        raise UserError(ExitCode.DATA, what, path, "choose another with --field")
    return names


def _rows_at_once(group: Any, field: str) -> int:
    """Return the number of rows that fill about one block."""
    columns = map(group.column, range(group.num_columns))
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == field)
    return max(1, min(MOST_ROWS, BLOCK_BYTES * group.num_rows // max(1, size)))


def _values(file: Any, group: int, n_rows: int, field: str, names: list[str]) -> Iterator[list[str | bytes | None]]:
    """Yield the values of the column, `n_rows` at a time. Raises `DamagedStream`."""
    with _damage():
        for batch in file.iter_batches(n_rows, [group], [field], use_threads=False):
            yield _python_values(batch.column(batch.schema.names.index(names[0])), names)


def _python_values(array: Any, names: list[str]) -> list[str | bytes | None]:
    """Return the values of an array: strings, or bytes if a value is not UTF-8, which pyarrow does not check."""
    import pyarrow
    from pyarrow import compute, types

    for name in names[1:]:
        array = compute.struct_field(array, name)  # pyright: ignore[reportAttributeAccessIssue] - made at run time
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return array.cast(pyarrow.large_binary()).to_pylist()


def _text(value: str | bytes | None, row: int, field: str, faults: Faults) -> str | None:
    """Return the text of a row, or None if the row is blank or faulty."""
    if value is None:
        faults.leave_out(Bad(row, f"field {quote(field)} is null"))
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            bad = Bad(row, f"not UTF-8 (byte {error.start + 1} of the text is 0x{value[error.start]:02X})")
            if not faults.replacing:
                faults.leave_out(bad)
                return None
            faults.replace(bad)
            value = value.decode("utf-8", "replace")
    return value if value.strip() else None
