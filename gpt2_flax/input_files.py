"""Limits on the numbers of users, and readers for files of users that trust nothing in them.

The readers wait for no file, and no file fills memory or the stack.
"""

import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from gpt2_flax.errors import ExitCode, UserError, quote

# These limits are far above any real run. They catch slips of the pen, and keep results within int32 and int64.
MOST_STEPS = 2**31 - 1  # optax counts steps in int32
MOST_TOKENS = 2**24  # in a vocabulary
MOST_POSITIONS = MOST_ROWS = 2**20  # tokens in a row, rows in a batch

CONFIG_BYTES = 2**20
VOCABULARY_BYTES = 2**28  # the largest published tokenizer.json have 2**25

_DEEPEST = 32  # levels of nesting
_TOO_DEEP = "it is nested too deeply"
# A key of 256 names or more; tomllib takes minutes for 100,000. A string could match too, but real configs hold none.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){256}""", re.ASCII)


def read_whole(path: Path, limit: int, code: ExitCode = ExitCode.DATA) -> bytes:
    """Return the content of a file or of an unnamed pipe, such as `<(command)` in a shell.

    Raises:
        OSError: If the file cannot be read.
        UserError: NO_INPUT for a folder, a named pipe, a socket or a device; `code` if there are more than `limit`
            bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # do not wait for a named pipe
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(mode) and os.path.realpath(path).startswith("/proc/"):
            os.set_blocking(descriptor, True)
        elif not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
            raise UserError(ExitCode.NO_INPUT, f"{kind} where a file is expected", path, "give a regular file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(content) > limit:
        raise UserError(code, f"file has more than {limit:,} bytes", path, "give a file of the right kind")
    return content


def read_object(path: Path, limit: int = CONFIG_BYTES, fix: str = "copy or download it again") -> dict[str, Any]:
    """Return the JSON object in a file. Raises as `read_whole`, and `UserError` (DATA, `fix`) for other content."""
    try:
        return parse_json(read_whole(path, limit))
    except ValueError as error:
        raise UserError(ExitCode.DATA, f"not a JSON file ({quote(str(error))})", path, fix) from None


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Return the object of a JSON text. Raises `ValueError` with the reason if it is none or nested too deeply."""
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if not isinstance(values, dict):
        raise ValueError("it is not an object")
    _check_depth(values)
    return values


def parse_toml(text: str) -> dict[str, Any]:
    """Return the values of a TOML text. Raises `ValueError` with the reason if it is not TOML or nested too deeply."""
    if _LONG_KEY.search(text):
        raise ValueError(_TOO_DEEP)
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # raised by `int`
        raise ValueError("a number has thousands of digits") from None
    _check_depth(values)
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands there twice")
    return values


def _check_depth(values: Any) -> None:
    """Raise ValueError for values that are nested too deeply for recursive functions."""
    level = [[values]]
    for _ in range(_DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [value for one in inner for value in one if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
