"""Which tokens begin and end a document: what the user says, else what the files beside a tokenizer say."""

import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.input_files import VOCABULARY_BYTES, read_object

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_NAMES, _IDS = (CONFIG, SPECIAL_TOKENS_MAP), ("generation_config.json", "config.json")


class Ends(NamedTuple):
    """The tokens, as texts, that a user wants to begin and end documents; None: as the files say."""

    bos: str | None = None
    eos: str | None = None


FROM_FILES = Ends()


def named_tokens(file: Path, ids: Mapping[str, int], special: Collection[str], ends: Ends) -> dict[str, str]:
    """Return the special tokens that `ends` or the files beside the tokenizer `file` name, by the name in them.

    The first file that names one wins: tokenizer_config.json, special_tokens_map.json, then, for begin and end alone,
    the ids in generation_config.json and config.json. Files that disagree are reported on standard error.

    Args:
        ids: the vocabulary.
        special: tokens of it that an id may mean; GPT-2's config.json has the id 50256 unasked, which may be any word.

    Raises:
        UserError: USAGE if a token of `ends` is not in `ids`, DATA if a file cannot be read.
    """
    files = {place: optional_object(file.with_name(place)) for place in (*_NAMES, *_IDS)}
    tokens = {ids[token]: token for token in special}
    found = {}
    for name, wanted in (("bos_token", ends.bos), ("eos_token", ends.eos)):
        if wanted is not None and wanted not in ids:
            option = f"--{name.removesuffix('_token')} {quote(wanted)}"
            raise UserError(ExitCode.USAGE, f"{option} is no token of the vocabulary", file, "give one that it holds")
        found[name] = wanted or _said(file.parent, files, name, ids, tokens)
    for name in ("pad_token", "unk_token"):
        found[name] = next((token for place in _NAMES if (token := _token(files[place].get(name))) in ids), None)
    if found["pad_token"] in (found["bos_token"], found["eos_token"]):
        found["pad_token"] = None  # as saved folders name the end token where there is no padding token
    return {name: token for name, token in found.items() if token is not None}


def optional_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one if there is none. Raises `UserError` as `read_object`."""
    return read_object(path, VOCABULARY_BYTES, "restore or delete it") if os.path.lexists(path) else {}


def _said(
    folder: Path, files: Mapping[str, Any], name: str, ids: Mapping[str, int], tokens: Mapping[int, str]
) -> str | None:
    """Return the token that the first of `files` to do so calls `name`; `tokens` are what an id may mean."""
    found: dict[str, str] = {}  # by file
    remarks = []
    for place in _NAMES:
        token = _token(files[place].get(name))
        if token in ids:
            found[place] = token
        elif token is not None:
            remarks.append(f"{place} says {quote(token)}, which the vocabulary lacks")
    for place in _IDS:
        value = files[place].get(f"{name}_id")
        numbers = [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]
        if listed := [tokens[number] for number in numbers if number in tokens]:
            found[place] = listed[0]
        if len(listed) > 1:
            remarks.append(f"{place} lists {', '.join(map(quote, listed))}")
    chosen = next(iter(found.values()), None)
    remarks += [f"{place} says {quote(token)}" for place, token in found.items() if token != chosen]
    if remarks:
        used = "" if chosen is None else f"; {quote(chosen)} is used"
        print(f"warning: {name} in {folder}: {', '.join(remarks)}{used}", file=sys.stderr)
    return chosen


def _token(value: object) -> str | None:
    """Return the text of a token that is a string or an AddedToken in JSON."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
