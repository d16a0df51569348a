"""The file dataset.json: its schema, and how it is read and written."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from gpt2_flax.errors import ExitCode, UserError, io_error, quote
from gpt2_flax.folders import json_sha256, write_whole
from gpt2_flax.input_files import VOCABULARY_BYTES, read_whole

FORMAT = "gpt2_flax token dataset"
VERSION = 2
MARKER = "dataset.json"
SPLITS = ("train", "validation")
OFFSET = np.dtype("<u8")
"""The type of the numbers in an offset file."""

Count = Annotated[int, Field(ge=0, lt=2**60)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
TokenType = Literal["uint16", "uint32"]


class Record(BaseModel):
    """A section of dataset.json: strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Shard(Record):
    """A file of token ids and a file of document starts."""

    documents: Count
    tokens: Count
    unknown: Count
    """Number of unknown tokens."""
    characters: Count | None
    """None if it is not known."""
    max_id: Count
    """The largest token id of the shard."""
    tokens_sha256: Sha256
    offsets_sha256: Sha256
    file: None = None
    """Always null, as `first` is always 0: earlier versions could refer to tokens in a file outside the dataset."""
    first: Literal[0] = 0

    @model_validator(mode="after")
    def _agree(self) -> "Shard":
        if bool(self.documents) != bool(self.tokens) or max(self.documents, self.unknown) > self.tokens:
            counts = f"{self.documents} documents, {self.tokens} tokens, {self.unknown} unknown"
            raise ValueError(f"no shard has {counts}")
        return self


class Example(Record):
    """A line of a corpus that could not be read as it is; lines count from 1."""

    file: str
    line: Count
    reason: str


class LeftOut(Record):
    """Counts of documents that could not be read: skipped, or kept with U+FFFD in place of the bad bytes."""

    skipped: Count = 0
    replaced: Count = 0
    examples: list[Example] = Field(default=[], max_length=100)


class Duplicates(Record):
    """Counts of the documents that were dropped because an equal document came before."""

    documents: Count
    characters: Count


class DatasetInfo(Record):
    """The content of dataset.json. `characters` counts Unicode code points of the text, without special tokens."""

    format: Literal["gpt2_flax token dataset"] = FORMAT
    version: Literal[2] = VERSION
    dtype: TokenType
    vocab_size: int = Field(gt=0, le=2**31)
    bos_id: Count | None
    """The first token of every document; None if documents begin with their text."""
    eos_id: Count
    unk_id: Count | None
    tokenizer_fingerprint: str
    sources: list[str] = []
    encodings: dict[str, str] = {}
    """The encoding of each corpus file that was not read as UTF-8."""
    left_out: LeftOut = LeftOut()
    duplicates: Duplicates | None = None
    """None if no duplicates were searched for."""
    shards: dict[str, list[Shard]]

    def n_tokens(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return sum(shard.tokens for shard in self.shards[split])

    @property
    def unknown_share(self) -> float | None:
        """The share of unknown tokens among the tokens of text; None if the vocabulary has no unknown token."""
        if self.unk_id is None:
            return None
        shards = [shard for split in self.shards.values() for shard in split]
        framing = 1 if self.bos_id is None else 2  # special tokens of each document
        tokens = sum(shard.tokens - framing * shard.documents for shard in shards)
        return sum(shard.unknown for shard in shards) / max(1, tokens)


def sum_if_known(counts: Iterable[int | None]) -> int | None:
    """Return the sum of the counts; None if one of them is not known."""
    known = list(counts)
    return None if None in known else sum(filter(None, known))


def shard_paths(folder: Path, split: str, index: int) -> tuple[Path, Path]:
    """Return the paths of the token file and the offset file of a shard."""
    return folder / split / f"tokens-{index:05d}.bin", folder / split / f"offsets-{index:05d}.bin"


def write_info(folder: Path, info: DatasetInfo) -> None:
    """Write dataset.json, the last file of a dataset, with a checksum of its own content."""
    content = info.model_dump(mode="json")
    text = json.dumps({"sha256": json_sha256(content)} | content, ensure_ascii=False, indent=2)
    write_whole(folder / MARKER, f"{text}\n".encode())


def read_info(folder: Path) -> DatasetInfo:
    """Read dataset.json; raises `UserError`: NO_INPUT if it is missing, DATA if it is damaged or not supported."""
    path = folder / MARKER
    try:
        content = from_json(read_whole(path, VOCABULARY_BYTES))
        _check_version(content, path)
        sha256 = content.pop("sha256", None)  # missing in old datasets
        info = DatasetInfo.model_validate(content)
        if sha256 not in (None, json_sha256(content)):
            fix = 'prepare it again; if it was changed on purpose, delete its line "sha256"'
            raise UserError(ExitCode.DATA, "damaged dataset (sha256 differs)", path, fix)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(ExitCode.NO_INPUT, "dataset not found", path, "make it with `gpt2-flax prepare`") from None
    except OSError as error:
        raise io_error(error, path) from None
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"][-1] == "file" and isinstance(first["input"], str):
            what = "dataset refers to token files outside its folder, which is no longer supported"
            fix = "import the files again with `gpt2-flax import-tokens`, which copies them"
            raise UserError(ExitCode.DATA, what, path, fix) from None
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if set(info.shards) != set(SPLITS):
        raise _damaged(path, f"shards must have the splits {', '.join(SPLITS)}")
    largest = {split: max((shard.max_id for shard in shards), default=0) for split, shards in info.shards.items()}
    named = {"bos_id": info.bos_id or 0, "eos_id": info.eos_id, "unk_id": info.unk_id or 0}
    for name, token in (largest | named).items():
        if token >= info.vocab_size:
            raise _damaged(path, f"token id {token} of {name} is outside the vocabulary of {info.vocab_size}")
    return info


def _check_version(content: object, path: Path) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _damaged(path, f"it has no format: {FORMAT!r}")
    version = content.get("version")
    if version != VERSION:
        fix = f"this program reads version {VERSION}: prepare the dataset again"
        raise UserError(ExitCode.DATA, f"dataset has format version {quote(version)}", path, fix)


def _damaged(path: Path, how: str) -> UserError:
    return UserError(ExitCode.DATA, "damaged dataset", path, f"{how}; prepare it again")
