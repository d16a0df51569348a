"""The program: runs a command, tells what went wrong in one line, and exits with a code that scripts can trust."""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import NoReturn

import typer

from gpt2_flax.cli import DEBUG, app
from gpt2_flax.compilation_cache import keep_compiled_programs
from gpt2_flax.errors import ExitCode, UserError, io_error, printable
from gpt2_flax.folders import speak_utf8
from gpt2_flax.tpu import silence_libtpu_without_tpu


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits with a code of `ExitCode`; every failure is one line on stderr."""
    if arguments is None:
        speak_utf8()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    keep_compiled_programs()
    silence_libtpu_without_tpu()
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: Sequence[str] | None) -> int:
    """Runs a command, prints what went wrong, and returns the exit code."""
    try:
        code = app(arguments, prog_name="gpt2-flax", standalone_mode=False)
        sys.stdout.flush()  # here, where a full disk still becomes an error
        return code if isinstance(code, int) else ExitCode.OK
    except (BrokenPipeError, SystemExit):  # the reader of a pipe has seen enough; typer makes the latter of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # not OK: a training run that ends here is not finished
    except (Exception, KeyboardInterrupt) as error:
        failure = _failure(error)
        if os.environ.get(DEBUG):
            traceback.print_exc()
        print(f"error: {printable(str(failure))}", file=sys.stderr)
        return failure.exit_code


def _failure(error: BaseException) -> UserError:
    """Returns what the user is told of `error`; the traceback of one that should not have come up is kept in a file."""
    if isinstance(error, UserError):
        return error
    # typer brings its own click since 0.26, and names only this part of it.
    if isinstance(error, typer.BadParameter.__base__):
        command = error.ctx.command_path if error.ctx else "gpt2-flax"
        return UserError(ExitCode.USAGE, error.format_message().rstrip("."), command, f"see `{command} --help`")
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return UserError(
            ExitCode.INTERRUPTED,
            "interrupted",
            "by the keyboard",
            "the same command starts over, or goes on where it can",
        )
    if isinstance(error, OSError):
        return io_error(error, error.filename or "a file")
    log = {"prefix": "gpt2-flax-crash-", "suffix": ".log", "encoding": "utf-8", "errors": "backslashreplace"}
    with tempfile.NamedTemporaryFile("w", delete=False, **log) as file:
        traceback.print_exception(error, file=file)
    what = f"a bug in gpt2_flax ({type(error).__name__})"
    return UserError(ExitCode.BUG, what, file.name, "please report it with that file")


if __name__ == "__main__":
    main()
