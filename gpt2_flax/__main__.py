"""The program: run a command, report a failure in one line, and exit with a code that scripts can rely on."""

import io
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from types import CoroutineType
from typing import Any, NoReturn, cast

from gpt2_flax.errors import ExitCode, Stopped, UserError, io_error, naming_file, printable
from gpt2_flax.folders import speak_utf8
from gpt2_flax.interruption import catch_signals, finish


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with a code of `ExitCode`. Every failure is one line on stderr."""
    if arguments is None:
        catch_signals()  # before the imports for a command, which take a second
        sys.unraisablehook = _unraisable
        # Reads that were not begun when another read of tensorstore failed; the failure is raised.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        speak_utf8()
    for stream in cast("list[io.TextIOWrapper]", [sys.stdout, sys.stderr]):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    from gpt2_flax.accelerators import silence_what_is_not_here
    from gpt2_flax.compilation_cache import keep_compiled_programs

    keep_compiled_programs()
    silence_what_is_not_here()
    sys.exit(exit_code(arguments))


def _unraisable(unraisable: Any) -> None:
    """Hide tracebacks of tensorstore's callbacks, and of other reads after a failed one; the errors are raised too."""
    if unraisable.object is not None and not isinstance(unraisable.object, CoroutineType):
        sys.__unraisablehook__(unraisable)


def exit_code(arguments: Sequence[str] | None) -> int:
    """Run a command, print its failure, and return the exit code."""
    from gpt2_flax.cli import DEBUG, app

    try:
        code = app(arguments, prog_name="gpt2-flax", standalone_mode=False)
        with naming_file("standard output"):
            sys.stdout.flush()  # here, so that a full disk is reported
        return finish(code if isinstance(code, int) else ExitCode.OK)
    except (BrokenPipeError, SystemExit) as ended:  # the reader closed the pipe; typer raises SystemExit
        if isinstance(ended, SystemExit) and not ended.code:  # completion for a shell ends so
            return finish(ExitCode.OK)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return finish(128 + signal.SIGPIPE)  # not OK, because the command did not finish
    except Exception as error:
        failure = _failure(error, sys.argv[1:] if arguments is None else arguments)
        finish(failure.exit_code)
        if os.environ.get(DEBUG):
            import traceback

            traceback.print_exc()
        print(f"{failure.prefix}{printable(str(failure))}", file=sys.stderr)
        return failure.exit_code


_SMALLER = {
    "tokenizer": "lower --vocab-size",
    "prepare": "lower --workers",
    "train": "lower data.global_batch_size or the sizes of the model",
    "evaluate": "lower --batch-size or --seq-length",
    "generate": "lower --max-new-tokens",
    "serve": "lower --max-tokens",
}
"""How a command needs less memory."""


def _failure(error: BaseException, arguments: Sequence[str]) -> UserError:
    """Return the failure that the user reads. The traceback of a bug is kept in a file."""
    import typer

    if isinstance(error, Stopped):
        again = f"to go on: {shlex.join(['gpt2-flax', *arguments])}"
        return Stopped(error.exit_code, error.what, error.where, again)
    if isinstance(error, UserError):
        return error
    # The class of all errors of usage, which typer does not name.
    if isinstance(error, cast("type[typer.BadParameter]", typer.BadParameter.__base__)):
        command = error.ctx.command_path if error.ctx else "gpt2-flax"
        return UserError(ExitCode.USAGE, error.format_message().rstrip("."), command, f"see `{command} --help`")
    from gpt2_flax.memory import out_of_memory

    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if failure := out_of_memory(error, f"gpt2-flax {command}", _SMALLER.get(command, "use a machine with more memory")):
        return failure
    if isinstance(error, OSError):
        return io_error(error, error.filename or "a file")
    from gpt2_flax.crash_log import CrashLog

    with CrashLog() as log:
        return log.bug(error)


if __name__ == "__main__":
    main()
