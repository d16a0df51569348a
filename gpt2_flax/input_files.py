"""How much a user may ask for, and files that a user gives, read without trusting them.

No file is waited for, and none fills memory or the stack.
"""

import json
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from gpt2_flax.errors import ExitCode, UserError, quote

# Far above any real run: what is computed from these fits int32 and int64, and a slip of the pen is named.
MOST_STEPS = 2**31 - 1  # optax counts steps in int32
MOST_TOKENS = 2**24  # of a vocabulary
MOST_POSITIONS = MOST_ROWS = 2**20  # tokens in a row, rows in a batch

CONFIG_BYTES = 2**20
VOCABULARY_BYTES = 2**28  # the largest published tokenizer.json have 2**25

_DEEPEST = 32  # of values inside one another
_TOO_DEEP = "it is nested too deeply"
# tomllib takes minutes for a key of 100,000 parts. A string may hold as many words with dots behind them, but does not.
_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){256}""", re.ASCII)


def read_whole(path: Path, limit: int, code: ExitCode = ExitCode.DATA) -> bytes:
    """Returns what a file of at most `limit` bytes holds; also an unnamed pipe, such as `<(command)` in a shell.

    Raises `OSError`, and `UserError`: NO_INPUT for a folder, a named pipe, a socket or a device, `code` when there is
    more.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else a named pipe is waited for
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
    """Returns the JSON object in a file; raises as `read_whole`, and `UserError` (DATA, `fix`) for anything else."""
    content = read_whole(path, limit)
    try:
        values = json.loads(content, object_pairs_hook=_unique)
        _check_depth(values)
    except (ValueError, RecursionError) as error:
        reason = _TOO_DEEP if isinstance(error, RecursionError) else str(error)
        raise UserError(ExitCode.DATA, f"not a JSON file ({quote(reason)})", path, fix) from None
    if not isinstance(values, dict):
        raise UserError(ExitCode.DATA, "not a JSON object", path, fix)
    return values


def parse_toml(text: str) -> dict[str, Any]:
    """Returns the values of a TOML text; raises `ValueError` with the reason when it is none, or far from a config."""
    if _LONG_KEY.search(text):
        raise ValueError(_TOO_DEEP)
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except tomllib.TOMLDecodeError:
        raise
    except ValueError:  # by `int`
        raise ValueError("a number has thousands of digits") from None
    _check_depth(values)
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands there twice")
    return values


def _check_depth(values: Any) -> None:
    """Raises ValueError for what may be too deep for functions that call themselves."""
    level = [[values]]
    for _ in range(_DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [value for one in inner for value in one if isinstance(value, dict | list)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
