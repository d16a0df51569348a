"""From nested dicts to configs and back, and the sentence for a wrong key."""

import difflib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.config.schema import Config
from gpt2_flax.errors import ExitCode, UserError, quote


def _config_error(error: Any, where: str, keys: Sequence[str]) -> UserError:
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
    known = [*keys, "stages"]  # `stages` is known only in files, see `config.file`
    beside = {other.removeprefix(prefix).partition(".")[0] for other in known if other.startswith(prefix)}
    anywhere = {other.rpartition(".")[2]: other for other in keys}
    for choices in ({word: prefix + word for word in beside}, anywhere):
        initials = [word for word in choices if "".join(part[0] for part in word.split("_")) == name]
        if close := initials or difflib.get_close_matches(name, choices, n=1):
            return choices[close[0]]
    return None


def config_keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key with its pydantic field, in the order of the schema."""
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= config_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field
    return keys


def config_values(config: Config) -> dict[str, Any]:
    """Return the value of every dotted key."""
    return {key: operator.attrgetter(key)(config) for key in config_keys()}


def parse_config(values: dict[str, Any], where: str) -> Config:
    """Return `values`, nested dicts, as a `Config`.

    Args:
        values: sections, and their keys.
        where: origin of `values`, for the error.

    Raises:
        UserError: CONFIG, with the first wrong key.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt key is the cause of the missing one beside it.
        first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
        raise _config_error(first, where, list(config_keys())) from None


def parse_model(values: Mapping[str, Any], where: object, fix: str) -> ModelConfig:
    """Return the architecture that a model file states; raise `UserError` (DATA) that names the first bad field."""
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        reason = first["ctx"]["error"] if "ctx" in first and first["type"] == "value_error" else first["msg"]
        what = f"bad value of {field}: {reason}, not {quote(first['input'])}" if field else f"bad model: {reason}"
        raise UserError(ExitCode.DATA, what, where, fix) from None


def dump_config(config: Config) -> str:
    """Return the config as TOML; `config.file.load_config` reads it back as an equal object."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))
