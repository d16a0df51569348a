"""Find the tokens that begin and end a document: as the user says, or as the files beside a tokenizer say."""

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
    """The tokens that begin and end documents; None leaves the choice to the files.

    Fingerprints of tokenizers contain the repr of this class.
    """

    bos: str | None = None
    eos: str | None = None


FROM_FILES = Ends()


def named_tokens(file: Path, ids: Mapping[str, int], special: Collection[str], ends: Ends) -> dict[str, str]:
    """Return the begin, end, padding and unknown tokens that `ends` or the files beside `file` name.

    The first file to name a token wins: tokenizer_config.json, special_tokens_map.json, then, for begin and end only,
    the ids in generation_config.json and config.json. Files that disagree are reported on standard error.

    Args:
        file: the file of the tokenizer.
        ids: its vocabulary.
        special: the tokens that an id in a file may mean. `transformers` writes GPT-2's 50256 into config.json by
            default, which may be the id of any word.

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
        found[name] = wanted or _from_files(file.parent, files, name, ids, tokens)
    for name in ("pad_token", "unk_token"):
        found[name] = next((token for place in _NAMES if (token := _token(files[place].get(name))) in ids), None)
    if found["pad_token"] in (found["bos_token"], found["eos_token"]):
        found["pad_token"] = None  # a saved tokenizer without a padding token names its end token
    return {name: token for name, token in found.items() if token is not None}


def optional_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or an empty one if there is no file. Raises `UserError` as `read_object`."""
    return read_object(path, VOCABULARY_BYTES, "restore or delete it") if os.path.lexists(path) else {}


def _from_files(
    folder: Path, files: Mapping[str, Any], name: str, ids: Mapping[str, int], tokens: Mapping[int, str]
) -> str | None:
    """Return the token that the first of `files` calls `name`; `tokens` are the tokens that an id may mean."""
    found: dict[str, str] = {}  # by the name of the file
    remarks = []
    for place in _NAMES:
        token = _token(files[place].get(name))
        if token is not None and token in ids:
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
    """Return the text of a token: a string, or an AddedToken in JSON."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
