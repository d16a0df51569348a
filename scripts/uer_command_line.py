"""What the scripts with UER-py's names share: its flags, the files they name, and gpt2-flax commands in their place."""

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
    """Flags of a UER-py program; `instead` says what to do for those that have no place here.

    A name in it that ends in an underscore stands for all that begin so.
    """

    def __init__(self, description: str, instead: Mapping[str, str]):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self._instead = instead

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Raises `UserError` (USAGE) for anything that is not understood; nothing is passed over in silence."""
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
    """Returns a path as gpt2-flax commands take it: expanded, and no address."""
    try:
        return Path(local_path(given))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_folder(output_model_path: Path) -> Path:
    """Returns the run folder that stands for UER-py's `--output_model_path NAME.bin`: NAME."""
    return output_model_path.with_suffix("") if output_model_path.suffix == ".bin" else output_model_path


def named_model(path: Path) -> Path:
    """Returns what a path of UER-py names here: NAME.bin-STEP is the checkpoint STEP of the run NAME.

    A file or folder of just that name comes first.
    """
    if path.exists():
        return path
    if (match := _STEP.fullmatch(path.name)) and (run := path.with_name(match["name"])).is_dir():
        return run / "checkpoints" / match["step"]
    return run_folder(path)


def shown(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Returns the gpt2-flax command as one would type it."""
    variables = [f"{name}={value}" for name, value in (environment or {}).items()]
    return " ".join([*variables, shlex.join(["gpt2-flax", *arguments])])


def run_before(*arguments: str) -> None:
    """Prints and runs a gpt2-flax command in a process of its own, and ends this one when it fails."""
    print(shown(arguments), flush=True)
    code = subprocess.run([sys.executable, "-m", "gpt2_flax", *arguments], check=False).returncode
    if code:
        raise SystemExit(code)


def run_instead(*arguments: str, **environment: str) -> NoReturn:
    """Prints a gpt2-flax command and becomes it: its signals and its exit code are those of this process."""
    print(shown(arguments, environment), flush=True)
    os.execve(sys.executable, [sys.executable, "-m", "gpt2_flax", *arguments], os.environ | environment)


def exit_code(main: Callable[[], None]) -> int:
    """Runs a script; a failure that its reader can mend is one line."""
    speak_utf8()
    try:
        main()
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return error.exit_code
    return ExitCode.OK
