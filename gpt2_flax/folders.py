"""What a user's path means, in UTF-8; folders that appear whole or not at all, and that one process works in."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from gpt2_flax.errors import ExitCode, UserError, io_error, naming_file
from gpt2_flax.interruption import cleaned_up


def speak_utf8() -> None:
    """Starts this program anew in Python's UTF-8 mode if the locale has another encoding.

    Else paths and prompts would be read by the locale, and libraries in C++ would write other names than Python does.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def is_utf8(text: str) -> bool:
    """Returns whether it came as UTF-8; of other bytes Python makes lone surrogates, which few libraries can name."""
    return text == text.encode(errors="replace").decode()


def utf8_name(path: str) -> str:
    """Returns what can be written of a file's name."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_address(path: str) -> bool:
    """Returns whether `fsspec` is asked for it, and not this machine."""
    return "://" in path


def local_path(given: str) -> str:
    """Returns a path as its user means it, with `~` and `~user` expanded, which a shell does not do after a `=`.

    Raises `ValueError` for an address, which would become a path below a folder `s3:`, for an unknown home folder, and
    for what is no path.
    """
    if is_address(given):
        raise ValueError(f"{given} is an address, and only a path of this machine works here")
    if "\0" in given or not is_utf8(given):
        raise ValueError(f"{given} is not a name in UTF-8: rename it")
    path = os.path.expanduser(given)  # noqa: PTH111 - Path.expanduser raises where there is no home folder
    if path.startswith("~") and not os.path.lexists(path):
        raise ValueError(f"{given} is in a home folder that is not known: write the whole path")
    return path


def cache_folder() -> Path | None:
    """Returns where this program keeps what it can make again, None for a user without a home folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - as in `local_path`
    return None if base.startswith("~") else Path(base, "gpt2_flax")


def file_sha256(path: Path) -> str:
    """Returns the hexadecimal sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all, also after a power failure; makes its folder, keeps links."""
    path = Path(os.path.realpath(path))
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


def check_link(output: Path) -> None:
    """Raises `UserError` (CANT_CREATE) for a link that leads nowhere; of others, what they lead to is written."""
    if output.is_symlink() and not output.exists():
        fix = f"make the folder {os.path.realpath(output)}, or remove the link"
        raise UserError(ExitCode.CANT_CREATE, "output is a link that leads nowhere", output, fix)


def check_output(output: Path, marker: str, overwrite: bool) -> None:
    """Raises `UserError` when `output` cannot be written, or may not: it exists and overwriting was not asked, or it is
    not ours.

    `marker` is a file that every finished folder of this kind holds; a folder without it is never replaced.
    """
    if not output.name:
        raise UserError(ExitCode.CANT_CREATE, "output has no name", output.absolute(), "give the name of a new folder")
    check_link(output)
    place = Path(os.path.realpath(output))
    if os.path.lexists(place):
        if not place.is_dir():
            raise UserError(ExitCode.CANT_CREATE, "output exists and is not a folder", output, "choose another name")
        if any(place.iterdir()):
            what = "output folder exists"
            if not (place / marker).is_file():
                fix = f"it holds no {marker}, so it is not ours to replace: choose another name"
                raise UserError(ExitCode.CANT_CREATE, what, output, fix)
            if not overwrite:
                raise UserError(ExitCode.CANT_CREATE, what, output, "choose another name or add --overwrite")
        if _is_mount_point(place):
            fix = f"give a folder inside it, such as {output / 'new'}"
            raise UserError(ExitCode.CANT_CREATE, "output is a mount point, which cannot be replaced", output, fix)
    above = next(folder for folder in place.parents if folder.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        fix = f"check who owns {above} and its mode"
        raise UserError(ExitCode.CANT_CREATE, "output folder cannot be made", output, fix)


@contextlib.contextmanager
def new_folder(output: Path, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `output` that takes its name when the block ends without an exception.

    If `output` is a link to a folder, that folder is replaced and the link stays. Nothing is left behind when the
    block fails; what a killed process left, the next call for `output` removes. Raises `UserError` as `check_output`
    does, or when the place cannot be written.
    """
    check_output(output, marker, overwrite)
    place = Path(os.path.realpath(output))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        claim = _claim(place.parent, f".{place.name}.tmp-")
        temporary = Path(claim.name).with_suffix("")
        temporary.mkdir()
    except OSError as error:
        what = "output folder cannot be made"
        fix = f"check the path and its permissions ({error.strerror})"
        raise UserError(ExitCode.CANT_CREATE, what, output, fix) from None
    try:
        with cleaned_up(lambda: (_remove(temporary), Path(claim.name).unlink(missing_ok=True))):
            yield temporary
        if not (temporary / marker).is_file():
            raise RuntimeError(f"{temporary} was finished without {marker}")
        check_output(output, marker, overwrite)  # again: the work may have taken hours
        if place.is_dir():
            shutil.rmtree(place)
        temporary.rename(place)
    except OSError as error:
        raise io_error(error, output) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another process came before the lock was held
            claim.close()


def _claim(parent: Path, prefix: str) -> IO[bytes]:
    """Opens and locks a new file NAME.lock in `parent`, removed when it is closed, for a temporary folder NAME.

    Folders of this user whose lock nobody holds are removed first: the kernel unlocks the file however its process
    dies, and on another host the process may have any id.
    """
    for left in parent.glob(f"{glob.escape(prefix)}*.lock"):
        with contextlib.suppress(OSError):
            if left.lstat().st_uid != os.getuid():  # in a folder for temporary files: perhaps a trap
                continue
            with open(left, "ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (folder := left.with_suffix("")).exists():
                    shutil.rmtree(folder)
                left.unlink()
    claim = tempfile.NamedTemporaryFile("wb", prefix=prefix, suffix=".lock", dir=parent)  # noqa: SIM115
    with contextlib.suppress(OSError):  # a file system without locks: what is left there stays
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return claim


def _is_mount_point(folder: Path) -> bool:
    """Returns whether a volume, which may be part of the same file system, is mounted at an absolute path."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return folder.is_mount()
    # The fifth field is the place; in it blanks, line ends and backslashes are octal.
    name = re.sub(rb"[\\ \t\n]", lambda found: b"\\%03o" % found[0][0], os.fsencode(folder))
    return any(mount.split()[4] == name for mount in mounts)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields an empty folder in the system's place for temporary files, which is gone after the block.

    What a killed process left there, the next call removes.
    """
    claim = _claim(Path(tempfile.gettempdir()), "gpt2-flax-")
    folder = Path(claim.name).with_suffix("")
    try:
        with cleaned_up(lambda: (_remove(folder), Path(claim.name).unlink(missing_ok=True))):
            folder.mkdir(mode=0o700)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # another process came before the lock was held
            claim.close()


def _remove(folder: Path) -> None:
    """Removes a folder in which another thread may still make files."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


@contextlib.contextmanager
def folder_lock(folder: Path, in_use: str) -> Iterator[None]:
    """Keeps other processes out of `folder` until the block ends; the kernel lets go however this process dies.

    Raises `UserError` (CANT_CREATE) that says `in_use`, and by whom, when another process holds the file `lock`, and
    where the file system has no locks.
    """
    with open(folder / "lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            fix = f"wait for {file.read().strip() or 'it'}, stop it, or choose another output"
            raise UserError(ExitCode.CANT_CREATE, in_use, folder, fix) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            fix = f"choose an output on another disk, or mount this one with locks ({error.strerror})"
            raise UserError(ExitCode.CANT_CREATE, "file system without file locks", folder, fix) from None
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with naming_file(file.name):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
            file.flush()
        yield
