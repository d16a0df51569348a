"""Shared by the scripts with UER-py's names: their flags, their file names, and the gpt2-flax commands they run."""

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
    """The flags of a UER-py program.

    Args:
        instead: Advice for each flag that is not supported. A name that ends in an underscore is a prefix.
    """

    def __init__(self, description: str, instead: Mapping[str, str]):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._instead = instead

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse the arguments. Raises `UserError` (USAGE) for every flag or value that is not understood."""
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
    """Return an expanded path, and reject addresses, as gpt2-flax commands do."""
    try:
        return Path(local_path(given))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_folder(output_model_path: Path) -> Path:
    """Return the run folder NAME for UER-py's `--output_model_path NAME.bin`."""
    return output_model_path.with_suffix("") if output_model_path.suffix == ".bin" else output_model_path


def named_model(path: Path) -> Path:
    """Return the model for a path of UER-py: NAME.bin-STEP is the checkpoint STEP of the run NAME.

    An existing file or folder with the same name takes precedence.
    """
    if path.exists():
        return path
    if (match := _STEP.fullmatch(path.name)) and (run := path.with_name(match["name"])).is_dir():
        return run / "checkpoints" / match["step"]
    return run_folder(path)


def shown(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Return a gpt2-flax command in the form for a shell."""
    variables = [f"{name}={value}" for name, value in (environment or {}).items()]
    return " ".join([*variables, shlex.join(["gpt2-flax", *arguments])])


def run_before(*arguments: str) -> None:
    """Print and run a gpt2-flax command as a child process. Exit if it fails."""
    print(shown(arguments), flush=True)
    code = subprocess.run([sys.executable, "-m", "gpt2_flax", *arguments], check=False).returncode
    if code:
        raise SystemExit(code)


def run_instead(*arguments: str, **environment: str) -> NoReturn:
    """Print a gpt2-flax command and replace this process with it, so that signals and the exit code are shared."""
    print(shown(arguments, environment), flush=True)
    os.execve(sys.executable, [sys.executable, "-m", "gpt2_flax", *arguments], os.environ | environment)


def exit_code(main: Callable[[], None]) -> int:
    """Run a script, and print a failure that the user can fix as one line."""
    speak_utf8()
    try:
        main()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    return ExitCode.OK
