"""Shared by the scripts with UER-py's names: flags, paths, and the gpt2-flax commands that replace UER-py's."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from gpt2_flax.errors import ExitCode, UserError, printable
from gpt2_flax.folders import local_path, speak_utf8

_STEP = re.compile(r"(?P<name>.+)\.bin-(?P<step>\d+)")


class Flags(argparse.ArgumentParser):
    """Flags of a UER-py program; `instead` says what to do in place of an unsupported flag.

    A name in `instead` that ends in an underscore stands for all flags that begin with it.
    """

    def __init__(self, description: str, instead: Mapping[str, str]):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._instead = instead

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse the command line; raise `UserError` (USAGE) for each flag or value that is not understood."""
        options, unknown = self.parse_known_args(arguments)
        for flag in unknown:
            name = flag.partition("=")[0]
            family = next((known for known in self._instead if known.endswith("_") and name.startswith(known)), name)
            fix = self._instead.get(family, "leave it out; docs/from_uer.md has the flags that are understood")
            raise UserError(ExitCode.USAGE, "flag or value not understood", name, fix)
        return options

    def error(self, message: str) -> NoReturn:
        raise UserError(ExitCode.USAGE, message, self.prog, f"see: python {self.prog} --help")


def user_path(given: str) -> Path:
    """Return a path with `~` expanded, as in gpt2-flax commands; refuse an address."""
    try:
        return Path(local_path(given))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_folder(output_model_path: Path) -> Path:
    """Return the run folder for UER-py's `--output_model_path NAME.bin`: NAME."""
    return output_model_path.with_suffix("") if output_model_path.suffix == ".bin" else output_model_path


def named_model(path: Path) -> Path:
    """Return the model for a path of UER-py: NAME.bin-STEP is the checkpoint STEP of the run NAME.

    A file or folder with exactly that name takes precedence.
    """
    if path.exists():
        return path
    if (match := _STEP.fullmatch(path.name)) and (run := path.with_name(match["name"])).is_dir():
        return run / "checkpoints" / match["step"]
    return run_folder(path)


def shown(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Return the gpt2-flax command as a user would type it."""
    variables = [f"{name}={value}" for name, value in (environment or {}).items()]
    return " ".join([*variables, shlex.join(["gpt2-flax", *arguments])])


def run_before(*arguments: str) -> None:
    """Print a gpt2-flax command and run it in a new process; exit with its code if it fails."""
    print(shown(arguments), flush=True)
    code = subprocess.run([sys.executable, "-m", "gpt2_flax", *arguments], check=False).returncode
    if code:
        raise SystemExit(code)


def run_instead(*arguments: str, **environment: str) -> NoReturn:
    """Print a gpt2-flax command and replace this process by it, so that signals and the exit code are the command's."""
    print(shown(arguments, environment), flush=True)
    os.execve(sys.executable, [sys.executable, "-m", "gpt2_flax", *arguments], os.environ | environment)


def exit_code(main: Callable[[], None]) -> int:
    """Run a script and return its exit code; print a `UserError` as one line."""
    speak_utf8()
    try:
        main()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    return ExitCode.OK
