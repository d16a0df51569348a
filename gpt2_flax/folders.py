"""Folders that appear whole or not at all, that one process works in, and whether a file is still what was written."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gpt2_flax.errors import ExitCode, UserError, io_error, naming_file
from gpt2_flax.interruption import cleaned_up


def file_sha256(path: Path) -> str:
    """Returns the hexadecimal sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, also after a power failure; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with naming_file(path), open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power failure, as fsync does for the content of a file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(output: Path, marker: str, overwrite: bool) -> None:
    """Raises `UserError` when `output` may not be written: it exists and overwriting was not asked, or is not ours.

    `marker` is a file that every finished folder of this kind holds; a folder without it is never replaced.
    """
    if not output.name:
        raise UserError(ExitCode.CANT_CREATE, "output has no name", output.absolute(), "give the name of a new folder")
    if not os.path.lexists(output):
        return
    if not output.is_dir():
        raise UserError(ExitCode.CANT_CREATE, "output exists and is not a folder", output, "choose another name")
    if not any(output.iterdir()):
        return
    if not (output / marker).is_file():
        fix = f"it holds no {marker}, so it is not ours to replace: choose another name"
        raise UserError(ExitCode.CANT_CREATE, "output folder exists", output, fix)
    if not overwrite:
        raise UserError(ExitCode.CANT_CREATE, "output folder exists", output, "choose another name or add --overwrite")


@contextlib.contextmanager
def new_folder(output: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `output` that takes its name when the block ends without an exception.

    Nothing is left behind when the block fails. Raises `UserError` as `check_output` does, or when the place
    cannot be written.
    """
    check_output(output, marker, overwrite)
    temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        what = "output folder cannot be made"
        fix = f"check the path and its permissions ({error.strerror})"
        raise UserError(ExitCode.CANT_CREATE, what, output, fix) from None
    try:
        with cleaned_up(lambda: _remove(temporary)):
            yield temporary
        if not (temporary / marker).is_file():
            raise RuntimeError(f"{temporary} was finished without {marker}")
        check_output(output, marker, overwrite)  # again: the work may have taken hours
        if output.is_dir():
            shutil.rmtree(output)
        temporary.rename(output)
    except OSError as error:
        raise io_error(error, output) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields an empty folder in the system's place for temporary files, which is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="gpt2-flax-") as name, cleaned_up(lambda: _remove(Path(name))):
        yield Path(name)


def _remove(folder: Path) -> None:
    """Removes a folder in which another thread may still make files."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


@contextlib.contextmanager
def folder_lock(folder: Path, in_use: str) -> Iterator[None]:
    """Keeps other processes out of `folder` until the block ends; the kernel lets go however this process dies.

    Raises `UserError` (CANT_CREATE) that says `in_use`, and by whom, when another process holds the file `lock`.
    """
    with open(folder / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            fix = f"wait for {file.read().strip() or 'it'}, stop it, or choose another output"
            raise UserError(ExitCode.CANT_CREATE, in_use, folder, fix) from None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with naming_file(file.name):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            file.flush()
        yield
