"""Read the `Config` of a run, or of each of its stages, from a TOML or JSON file and `section.key=value` overrides.

A file without stages is one run. In a file with stages, each table `[[stages]]` holds the keys of one stage, and the
rest of the file applies to all stages. A stage is an ordinary run that starts from the weights of the stage before it.
"""

import copy
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_flax.config.named import config_file, names
from gpt2_flax.config.parse import parse_config
from gpt2_flax.config.schema import Config
from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.input_files import CONFIG_BYTES, parse_json, parse_toml, read_whole

_KEY = re.compile(r"(?:stages\.(?P<stage>[0-9]{1,9})\.)?(?P<key>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")
_COMMAND_LINE = Path("command line")
Overrides = Sequence[str] | Mapping[str, Any]
"""Texts `section.key=value`, with values as in TOML; or keys and their values."""


def is_override(text: str) -> bool:
    """Return whether `text` has the form `section.key=value`."""
    key, equals, _ = text.partition("=")
    return bool(equals) and _KEY.fullmatch(key) is not None


def load_config(path: Path | None, overrides: Sequence[str] = (), stage: int | None = None) -> Config:
    """Return the config of one run: the whole file, or the stage with a number, from 1.

    Raises:
        UserError: As `load_stages`; USAGE if the file has several stages and `stage` is None or too large.
    """
    stages, where = load_stages(path, overrides), path or _COMMAND_LINE
    if stage is None and len(stages) > 1:
        fix = f"choose one with --stage, 1 to {len(stages)}"
        raise UserError(ExitCode.USAGE, f"config has {len(stages)} stages", where, fix)
    if stage is not None and not 1 <= stage <= len(stages):
        raise UserError(ExitCode.USAGE, f"there is no stage {stage}", where, f"take 1 to {len(stages)}")
    return stages[(stage or 1) - 1]


def load_stages(path: Path | Mapping[str, Any] | None, overrides: Overrides = ()) -> list[Config]:
    """Return the configs of the stages of a file in order; one config if it has no stages.

    A mapping in place of the file has the values that a file would have, and may name a key with its section.

    The default of `init_from` in a later stage is the output of the stage before it.

    Args:
        path: a TOML file, a JSON file if its name ends in `.json`, or the name of a config of the package. With None,
            the overrides give all values.
        overrides: `section.key=value` for every stage or `stages.2.section.key=value` for the second, applied in order.

    Raises:
        UserError: NO_INPUT if the file is missing; CONFIG that names the dotted key and the stage of an error in the
            file; USAGE for a malformed override.
    """
    pairs = [*overrides.items()] if isinstance(overrides, Mapping) else [*map(_parse_override, overrides)]
    if isinstance(path, Mapping):
        pairs = [pair for pair in path.items() if "." in pair[0]] + pairs
        values, path = {key: _plain(value) for key, value in path.items() if "." not in key}, Path("config")
    else:
        values = {"data": {}, "training": {}} if path is None else _read(path)
    path = path or _COMMAND_LINE
    named = "stages" in values
    stages = _stages(values, path) if named else [values]
    for key, value in pairs:
        _override(stages, key, _plain(value))
    for before, stage in itertools.pairwise(stages):
        if "output" in before:
            stage.setdefault("init_from", before["output"])
    configs = [
        parse_config(stage, f"{path}, stage {number}" if named else str(path)) for number, stage in enumerate(stages, 1)
    ]
    for (one, first), (other, second) in itertools.combinations(enumerate(configs, 1), 2):
        if os.path.realpath(first.output) == os.path.realpath(second.output):
            what = f"stages {one} and {other} have the same output {quote(second.output)}"
            raise UserError(ExitCode.CONFIG, what, path, "give each stage a run folder of its own")
    return configs


def _read(path: Path) -> dict[str, Any]:
    language, parse = ("JSON", parse_json) if path.suffix == ".json" else ("TOML", parse_toml)
    try:
        return parse(read_whole(config_file(path), CONFIG_BYTES, ExitCode.CONFIG).decode("utf-8-sig"))
    except FileNotFoundError:
        fix = f"give a TOML or JSON file, or a config of this package: {names()}"
        raise UserError(ExitCode.NO_INPUT, "config not found", path, fix) from None
    except OSError as error:
        fix = f"the system says: {error.strerror}"
        raise UserError(ExitCode.NO_INPUT, "config cannot be read", path, fix) from None
    except UnicodeDecodeError as error:
        where = f"{path}:{error.object.count(10, 0, error.start) + 1}"
        raise UserError(ExitCode.CONFIG, "config is not UTF-8", where, "save the file as UTF-8") from None
    except ValueError as error:
        raise UserError(ExitCode.CONFIG, f"not a {language} file", path, f"fix it: {error}") from None


def _stages(values: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Return the values of each stage. Keys outside of stages apply to all, but `init_from` only to the first."""
    stages = values.pop("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(ExitCode.CONFIG, "stages must be tables", path, "begin each of them with a line [[stages]]")
    later = {key: value for key, value in values.items() if key != "init_from"}
    return [_merged(later if number else values, stage) for number, stage in enumerate(stages)]


def _merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `common` updated with `own`. Sections are merged; a table inside a section, as of datasets, is a value."""
    merged = copy.deepcopy(common)
    for name, value in own.items():
        sections = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merged[name] | value if sections else value
    return merged


def _plain(value: Any) -> Any:
    """Return a copy of a value in which paths are strings."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    return [*map(_plain, value)] if isinstance(value, list | tuple) else value


def _parse_override(override: str) -> tuple[str, Any]:
    if not is_override(override):
        fix = "write it as section.key=value, for example optimizer.learning_rate=3e-4"
        raise UserError(ExitCode.USAGE, "not an override", quote(override), fix)
    key, _, text = override.partition("=")
    return key, _value(text, override)


def _override(stages: Sequence[dict[str, Any]], name: str, value: Any) -> None:
    if not (match := _KEY.fullmatch(name)):
        fix = "write it as section.key, for example optimizer.learning_rate"
        raise UserError(ExitCode.USAGE, "not a key of a config", quote(name), fix)
    stage, key = match["stage"], match["key"]
    if stage is not None and not 1 <= int(stage) <= len(stages):
        raise UserError(ExitCode.USAGE, f"there is no stage {stage}", quote(name), f"take 1 to {len(stages)}")
    if stage is None and len(stages) > 1 and key in ("output", "init_from"):
        fix = f"name the stage, for example stages.{1 if key == 'output' else 2}.{key}={value}"
        raise UserError(ExitCode.USAGE, f"{key} is each stage's own", quote(name), fix)
    *sections, last = key.split(".")
    for table in stages if stage is None else [stages[int(stage) - 1]]:
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise UserError(ExitCode.CONFIG, "not a section", f"{section} in {quote(name)}", "check the key")
        table[last] = value


def _value(text: str, override: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError as error:
        if text.startswith("{"):
            fix = f"""fix it, for example 'data.dataset={{"data/zh" = 3, "data/en" = 1}}': {error}"""
            raise UserError(ExitCode.USAGE, "not a TOML table", quote(override), fix) from None
        return text  # a bare word is a string: output=runs/two
