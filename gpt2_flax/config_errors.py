"""Describe an error in a config, in a sentence that names the dotted key."""

import difflib
from collections.abc import Sequence
from typing import Any

from gpt2_flax.errors import ExitCode, UserError, quote


def config_error(error: Any, where: str, keys: Sequence[str]) -> UserError:
    """Return the sentence for an `error` of pydantic about the config `where`; `keys` are all known keys."""
    key = ".".join(
        str(part) for part in error["loc"] if part not in ("int", "float")
    )  # pydantic adds the member of a union
    key = key if len(key) <= 100 else f"{key[:97]}..."
    if error["type"] == "extra_forbidden":
        close = _nearest_key(key, keys)
        fix = f"did you mean {close}?" if close else "`gpt2-flax keys` lists all"
        return UserError(ExitCode.CONFIG, f"unknown key {key}", where, fix)
    if error["type"] == "missing":
        return UserError(ExitCode.CONFIG, f"missing key {key}", where, "add it, or give it on the command line")
    if error["type"] == "value_error":
        what = str(error["ctx"]["error"])
        if key in keys:  # the error is about one key, not about several that do not fit together
            return UserError(ExitCode.CONFIG, f"bad value of {key}", where, what)
        return UserError(ExitCode.CONFIG, what, where, "change one of them")
    fix = f"{error['msg']}, not {quote(error['input'])}"
    return UserError(ExitCode.CONFIG, f"bad value of {key}", where, fix[0].lower() + fix[1:])


def _nearest_key(key: str, keys: Sequence[str]) -> str | None:
    """Return the known key or section that is most similar to an unknown key: in its section, else anywhere."""
    prefix, name = key[: key.rfind(".") + 1], key.rpartition(".")[2]
    known = [*keys, "stages"]  # `stages` is known only in files, see `config_file`
    beside = {other.removeprefix(prefix).partition(".")[0] for other in known if other.startswith(prefix)}
    anywhere = {other.rpartition(".")[2]: other for other in keys}
    for choices in ({word: prefix + word for word in beside}, anywhere):
        initials = [word for word in choices if "".join(part[0] for part in word.split("_")) == name]
        if close := initials or difflib.get_close_matches(name, choices, n=1):
            return choices[close[0]]
    return None
