"""Errors for users: one clear sentence, and an exit code that scripts can rely on."""

import contextlib
import enum
import errno
import os
import signal
from collections.abc import Iterator


class ExitCode(enum.IntEnum):
    """Exit codes after BSD's sysexits.h. A wrapper should restart only on `TRY_AGAIN` and on signals."""

    OK = 0
    USAGE = 64  # the command line itself
    DATA = 65  # a corpus, vocabulary, dataset or weight file is damaged or does not fit
    NO_INPUT = 66  # an input is missing
    UNAVAILABLE = 69  # doctor found a fault in the machine or in installed packages
    BUG = 70  # in this program; the traceback is kept in a file
    OUT_OF_MEMORY = 71  # of the host or of a device
    CANT_CREATE = 73  # an output exists, is in use, or is not writable
    IO = 74  # reading or writing failed, disk full, no usable checkpoint
    TRY_AGAIN = 75  # stopped, and saved if training had begun; the same command resumes
    DIVERGED = 76  # loss or gradient not finite
    CONFIG = 78  # the configuration
    # Ended by a signal; nothing was saved:
    HUNG_UP = 128 + signal.SIGHUP
    INTERRUPTED = 128 + signal.SIGINT
    SIGNALLED_1 = 128 + signal.SIGUSR1
    SIGNALLED_2 = 128 + signal.SIGUSR2
    TERMINATED = 128 + signal.SIGTERM


class UserError(Exception):
    """A failure that the user can fix, printed as `error: <what>: <where>; <fix>` without a traceback.

    Attributes:
        exit_code: The `ExitCode` with which the command line would end.
        what: The failure.
        where: The file, line, key or call.
        fix: What to do.
    """

    prefix = "error: "

    def __init__(self, exit_code: ExitCode, what: str, where: object, fix: str):
        self.exit_code, self.what, self.where, self.fix = exit_code, what, str(where), fix
        super().__init__(f"{what}: {where}; {fix}")

    def __reduce__(self) -> tuple[type, tuple[ExitCode, str, str, str]]:
        return type(self), (self.exit_code, self.what, self.where, self.fix)  # so that workers can pickle it


class Stopped(UserError):
    """The end of a run that was asked to stop, and has saved. This is no failure; the exit code is TRY_AGAIN."""

    prefix = ""


def missing_package(task: str, package: str, extra: str, where: object) -> UserError:
    """Return the error for a missing optional `package`; the sentence names our extra that installs it."""
    fix = f"run: pip install 'gpt2_flax[{extra}]'"
    return UserError(ExitCode.USAGE, f"{task} needs {package}, which is not installed", where, fix)


def quote(text: object, limit: int = 80) -> str:
    """Return `text` as printable ASCII of at most `limit` characters, safe to show for any content."""
    try:
        shown = ascii(text)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists thousands deep
        shown = f"<{type(text).__name__}>"
    return shown if len(shown) <= limit else shown[: limit - 4] + "..." + shown[0]


def printable(text: str) -> str:
    """Return `text` with line ends, terminal sequences and the like escaped. File names may hold them too."""
    wide_blank = "\u3000"
    return "".join(one if one.isprintable() or one == wide_blank else ascii(one)[1:-1] for one in text)


@contextlib.contextmanager
def naming_file(name: object) -> Iterator[None]:
    """Add a file name to an OSError of the block; errors of write, flush and close have none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(name)
        raise


def io_error(error: OSError, where: object) -> UserError:
    """Return the sentence and exit code for an error of the operating system."""
    if error.errno == errno.ENOSPC:
        return UserError(ExitCode.IO, "disk full", where, "free some space and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(ExitCode.CANT_CREATE, "no permission", where, "check who owns it and its mode")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return UserError(ExitCode.IO, "reading or writing failed", where, f"the system says: {reason}")
