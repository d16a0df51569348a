"""Paths that users give, in UTF-8; folders that appear whole or not at all; locks on folders."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_flax.errors import ExitCode, UserError, io_error, naming_file
from gpt2_flax.interruption import cleaned_up, uninterrupted

_HUB = "hf://"
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?", re.ASCII)


def speak_utf8() -> None:
    """Restart this program in Python's UTF-8 mode if the locale has another encoding.

    Otherwise Python would decode paths and prompts by the locale, and libraries in C++ would write other file names.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def is_utf8(text: str) -> bool:
    """Return whether `text` came as UTF-8. Python turns other bytes into surrogates, which few libraries accept."""
    return text == text.encode(errors="replace").decode()


def utf8_name(path: str) -> str:
    """Return a file name with bytes that are not UTF-8 escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_address(path: str) -> bool:
    """Return whether `path` is an address for `fsspec`, not a path of this machine."""
    return "://" in path


def local_path(given: str) -> str:
    """Return a path with `~` and `~user` expanded, which a shell does not do after a `=`.

    Raises:
        ValueError: For an address, which would become a path below a folder `s3:`, for an unknown home folder, and for
            a name that is not UTF-8.
    """
    if is_address(given):
        raise ValueError(f"{given} is an address, and only a path of this machine works here")
    if "\0" in given or not is_utf8(given):
        raise ValueError(f"{given} is not a name in UTF-8: rename it")
    path = os.path.expanduser(given)  # noqa: PTH111 - Path.expanduser raises where there is no home folder
    if path.startswith("~") and not os.path.lexists(path):
        raise ValueError(f"{given} is in a home folder that is not known: write the whole path")
    return path


class HubModel(NamedTuple):
    """A model on the hub."""

    repo_id: str
    """OWNER/NAME."""
    revision: str | None = None
    """A branch, a tag or a commit; None for `main`."""

    def __fspath__(self) -> str:
        return f"{_HUB}{self.repo_id}{'' if self.revision is None else f'@{self.revision}'}"

    __str__ = __fspath__


def model_place(given: str, guess: bool = True) -> Path | HubModel:
    """Return the place that a user means by `given`: a path of this machine, or a model on the hub.

    Args:
        given: `hf://OWNER/NAME@REVISION`, without `@REVISION` for `main`, or a path.
        guess: Take `OWNER/NAME@REVISION` for a model on the hub unless the path, or a folder `OWNER`, exists here.

    Raises:
        ValueError: As `local_path`, and for another address.
    """
    address = given.startswith(_HUB)
    if name := _HUB_NAME.fullmatch(given.removeprefix(_HUB)):
        if address or (guess and not os.path.lexists(given) and not os.path.lexists(given.partition("/")[0])):
            return HubModel(name[1], name[2])
    elif address:
        raise ValueError(f"{given} is no model on the hub: write {_HUB}OWNER/NAME or {_HUB}OWNER/NAME@REVISION")
    return Path(local_path(given))


def path_or_address(given: str) -> str:
    """Return an address for `fsspec` unchanged, and a path expanded. Raises ValueError as `local_path`."""
    return given if is_address(given) else local_path(given)


def corpus_source(given: str) -> str:
    """Do the same as `path_or_address`, but accept file names in any encoding, because the files are only read."""
    return path_or_address(given) if is_utf8(given) else given


def cache_folder() -> Path | None:
    """Return the folder for files that this program can make again, None for a user without a home folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - as in `local_path`
    return None if base.startswith("~") else Path(base, "gpt2_flax")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(content: Any) -> str:
    """Return the hexadecimal sha256 of the canonical JSON of `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even if the power fails. Make its folder; write through links."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with naming_file(path), open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file for people, inside a folder that is not complete yet."""
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power failure, as fsync does for the content of a file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_link(output: Path) -> None:
    """Raise `UserError` (CANT_CREATE) for a link that leads nowhere. The target of other links is written."""
    if output.is_symlink() and not output.exists():
        fix = f"make the folder {os.path.realpath(output)}, or remove the link"
        raise UserError(ExitCode.CANT_CREATE, "output is a link that leads nowhere", output, fix)


def check_output(output: Path, marker: str, overwrite: bool) -> None:
    """Raise `UserError` (CANT_CREATE) if `output` cannot be written, or exists and may not be replaced.

    Args:
        marker: A file in every finished folder of this kind. A folder without it is never replaced.
        overwrite: Whether the user allows to replace a folder.
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
    """Yield an empty folder beside `output`, and rename it to `output` if the block raises nothing.

    If `output` is a link to a folder, that folder is replaced and the link stays. The folder is removed if the block
    fails; the next call for `output` removes the folder of a killed process.

    Raises:
        UserError: As `check_output`; CANT_CREATE if the folder cannot be made; IO if writing fails.
    """
    check_output(output, marker, overwrite)
    place = Path(os.path.realpath(output))
    with contextlib.ExitStack() as stack:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(_locked_folder(place.parent, f".{place.name}.tmp-"))
        except OSError as error:
            fix = f"check the path and its permissions ({error.strerror})"
            raise UserError(ExitCode.CANT_CREATE, "output folder cannot be made", output, fix) from None
        try:
            yield temporary
            if not (temporary / marker).is_file():
                raise RuntimeError(f"{temporary} was finished without {marker}")
            check_output(output, marker, overwrite)  # again: the work may have taken hours
            with uninterrupted():
                if place.is_dir():
                    replaced = temporary.with_name(f"{temporary.name}.replaced")
                    place.rename(replaced)
                    temporary.rename(place)
                    replaced.rename(temporary)  # so that it is removed
                else:
                    temporary.rename(place)
        except OSError as error:
            raise io_error(error, output) from error


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield an empty folder in the system's folder for temporary files, and remove it after the block.

    The next call removes the folder of a killed process.
    """
    with _locked_folder(Path(tempfile.gettempdir()), "gpt2-flax-", 0o700) as folder:
        yield folder


@contextlib.contextmanager
def _locked_folder(parent: Path, prefix: str, mode: int = 0o777) -> Iterator[Path]:
    """Make a folder NAME in `parent` with a locked file NAME.lock beside it, and remove both after the block.

    First remove folders of this user whose lock nobody holds. The kernel unlocks the file however its process dies,
    and a process id would mean nothing on another host.
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
    with contextlib.ExitStack() as stack:
        with uninterrupted():
            claim = tempfile.NamedTemporaryFile("wb", prefix=prefix, suffix=".lock", dir=parent, delete=False)  # noqa: SIM115
            stack.callback(claim.close)
            lock = Path(claim.name)
            folder = lock.with_suffix("")

            def remove() -> None:
                _remove(folder)
                lock.unlink(missing_ok=True)  # another process may have removed the file before it was locked

            stack.enter_context(cleaned_up(remove))
            stack.callback(remove)
            with contextlib.suppress(OSError):  # on a file system without locks, folders of killed processes stay
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.mkdir(mode=mode)
        yield folder


def _remove(folder: Path) -> None:
    """Remove a folder in which another thread may still make files."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def _is_mount_point(folder: Path) -> bool:
    """Return whether a volume is mounted at an absolute path; it may belong to the same file system as the parent."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return folder.is_mount()
    # The fifth field is the path; blanks, line ends and backslashes in it are octal.
    name = re.sub(rb"[\\ \t\n]", lambda found: b"\\%03o" % found[0][0], os.fsencode(folder))
    return any(mount.split()[4] == name for mount in mounts)


@contextlib.contextmanager
def folder_lock(folder: Path, in_use: str) -> Iterator[None]:
    """Keep other processes out of `folder` until the block ends. The kernel unlocks it however this process dies.

    Raises:
        UserError: CANT_CREATE that begins with `in_use` and names the process that holds the file `lock`, or if the
            file system has no locks.
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
