"""Detection of dataset files that change or are damaged: by size and time while in use, by checksum at first use."""

import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.folders import file_sha256

_NICENESS = 10  # of the thread that computes checksums


class Watch:
    """Detects files that change. A file that was touched or replaced by an equal one has not changed."""

    def __init__(self):
        self._watched: list[_Watched] = []

    def add(self, path: Path, check: Callable[[], None], descriptor: int | None = None) -> None:
        """Remember size, modification time and inode of a file.

        Args:
            path: The file.
            check: Reads the file and raises `UserError` (DATA) if its content has changed.
            descriptor: An open file to watch, even if `path` names another file later.
        """
        with _in_use(path):
            self._watched.append(_Watched(path, check, path if descriptor is None else descriptor))

    def add_content(self, path: Path) -> None:
        """Watch a small file whose present content must not change."""

        def check() -> None:
            if file_sha256(path) != before:
                raise UserError(ExitCode.DATA, "sha256 differs", path, "")

        self.add(path, check)
        with _in_use(path):
            before = file_sha256(path)

    def check(self) -> None:
        """Raise `UserError` (DATA) for the first file that has changed."""
        for watched in self._watched:
            with _in_use(watched.path):
                watched.check()


class _Watched:
    def __init__(self, path: Path, check: Callable[[], None], place: Path | int):
        self.path, self._check, self._place, self._inode_counts = path, check, place, True
        self._known = self._state()

    def check(self) -> None:
        found = self._state()
        if found == self._known:
            return
        self._check()
        # On some network file systems inodes change by themselves. Such a file is read again once, not at every save.
        self._inode_counts &= found[1:] != self._known[1:]
        self._known = (found[0] * self._inode_counts, *found[1:])

    def _state(self) -> tuple[int, int, int]:
        found = os.stat(self._place)  # noqa: PTH116 - a Path has no descriptor
        return found.st_ino if self._inode_counts else 0, found.st_size, found.st_mtime_ns


class FirstUse:
    """Runs checks one after another in a background thread, so that reading does not wait for them."""

    def __init__(self):
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], None]] = deque()
        self._started, self._running, self._unchecked_saves = 0, False, False
        self._failure: BaseException | None = None

    def add(self, check: Callable[[], None]) -> None:
        """Queue a check."""
        with self._changed:
            self._waiting.append(check)
            self._started += 1
            if not self._running and self._failure is None:
                self._running = True
                threading.Thread(target=self._work, name="checksums", daemon=True).start()

    def raise_failure(self) -> None:
        """Raise the exception of the check that failed, if any."""
        if self._failure is not None:
            raise self._failure

    def wait(self, patience: float | None) -> None:
        """Wait until all checks are done, at most `patience` seconds (None: any time); raise a failure.

        Prints a warning if checks are left.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._failure, patience)
            left, started = len(self._waiting), self._started
        self.raise_failure()
        if left:
            self._unchecked_saves = True
            what = f"the sha256 of {left} of {started} shards in use is not checked yet"
            print(f"warning: {what}: damage found later ends the run", file=sys.stderr, flush=True)

    def _work(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            failure = None
            try:
                self._waiting[0]()
            except BaseException as error:
                failure = error
            with self._changed:
                self._waiting.popleft()
                if self._unchecked_saves and isinstance(failure, UserError):
                    hint = "do not use the checkpoints that were saved since this start: they may have seen it"
                    failure = UserError(failure.exit_code, failure.what, failure.where, f"{failure.fix}; {hint}")
                self._failure = failure
                self._running = bool(self._waiting) and failure is None
                self._changed.notify_all()
                if not self._running:
                    return


@contextlib.contextmanager
def _in_use(path: Path) -> Iterator[None]:
    """Turn an error about a file into one that says that the file was right before."""
    fix = "bring the file back as it was, then run the same command again"
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(ExitCode.DATA, "file went away while it was in use", path, fix) from None
    except OSError as error:
        raise io_error(error, path) from None
    except UserError as error:
        if error.exit_code != ExitCode.DATA:
            raise
        raise UserError(error.exit_code, f"file changed while it was in use: {error.what}", error.where, fix) from None
