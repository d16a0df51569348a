"""The crash log: stacks and tracebacks of a process that dies, hangs or has a bug."""

import contextlib
import faulthandler
import fcntl
import os
import platform
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import IO

import gpt2_flax
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.interruption import cleaned_up


class CrashLog(AbstractContextManager):
    """FOLDER/crash-TIME-NUMBER.log, or a temporary file if the folder cannot hold it; an empty log is removed.

    Within the context, a fatal signal (SIGSEGV, SIGBUS, SIGABRT, ...) adds the stacks of all threads. The file is open
    from the beginning, because a fatal signal leaves no time to open it.
    """

    def __init__(self, folder: Path | None = None, number: int = 0):
        self.path, self._file = _open(folder, number)
        self._stack = ExitStack()

    def __enter__(self) -> "CrashLog":
        self._stack.enter_context(cleaned_up(self._remove_if_empty))
        if not faulthandler.is_enabled():  # otherwise the user wants the stacks in another place
            faulthandler.enable(self._file)
            self._stack.callback(faulthandler.disable)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._file.close()
        self._remove_if_empty()

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            if not self.path.stat().st_size:
                self.remove()

    @property
    def closed(self) -> bool:
        return self._file.closed

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def add_stacks(self, why: str) -> None:
        """Add the stacks of all threads."""
        self._add(lambda: (print(why, file=self._file, flush=True), faulthandler.dump_traceback(self._file)))

    def bug(self, error: BaseException) -> UserError:
        """Add the traceback of an unexpected error; return the error to show to the user."""
        self._add(lambda: traceback.print_exception(error, file=self._file))
        what = f"a bug in gpt2_flax ({type(error).__name__})"
        return UserError(ExitCode.BUG, what, self.path, "please report it with that file")

    def _add(self, write: Callable[[], object]) -> None:
        versions = f"gpt2_flax {gpt2_flax.__version__}, Python {platform.python_version()}"
        where = f"{time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()} on {socket.gethostname()}, {versions}"
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            print(where, *sys.argv, file=self._file, flush=True)
            write()
            self._file.flush()


def _open(folder: Path | None, number: int) -> tuple[Path, IO[str]]:
    if folder is not None:
        path = folder.absolute() / f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{number}.log"
        with contextlib.suppress(OSError):
            _remove_abandoned(folder)
            opening = path.with_suffix(".opening")  # other processes remove an empty log that nobody has locked
            file = open(opening, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - it stays open
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            opening.rename(path)
            return path, file
    file = tempfile.NamedTemporaryFile(  # noqa: SIM115
        "w", encoding="utf-8", errors="backslashreplace", prefix="gpt2-flax-crash-", suffix=".log", delete=False
    )
    return Path(file.name), file


def _remove_abandoned(folder: Path) -> None:
    """Remove the empty logs of processes that were killed."""
    for path in folder.glob("crash-*.log"):
        with contextlib.suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_size:
                path.unlink()
