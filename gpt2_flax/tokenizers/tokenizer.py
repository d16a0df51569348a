"""Define the interface of tokenizers, and load the tokenizer at a path."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.input_files import MOST_TOKENS
from gpt2_flax.tokenizers.ragged_ids import RaggedIds
from gpt2_flax.tokenizers.sentencepiece import read_sentencepiece
from gpt2_flax.tokenizers.special_tokens import CONFIG, FROM_FILES, Ends, optional_object
from gpt2_flax.tokenizers.tokenizer_json import MERGES, VOCABULARY, read_tokenizer_json
from gpt2_flax.tokenizers.wordpiece import read_wordpiece


class Tokenizer(Protocol):
    """Turns text into ids and back. Special ids surround a document; text never gives them. Can be pickled."""

    vocab_size: int
    """The largest id plus 1."""
    bos_id: int
    eos_id: int
    pad_id: int | None
    unk_id: int | None

    @property
    def fingerprint(self) -> str:
        """A sha256 of everything that determines ids; `save` and `load_tokenizer` do not change it."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> RaggedIds:
        """Return the ids of each text, without special ids."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special and unknown tokens, as `skip_special_tokens` of `transformers`."""
        ...

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        """Write files into an existing folder, from which `transformers.AutoTokenizer` gives the same ids."""
        ...


def load_tokenizer(path: Path, lowercase: bool | None = None, ends: Ends = FROM_FILES) -> Tokenizer:
    """Return the tokenizer of a `vocab.txt`, a SentencePiece `.model`, a `tokenizer.json`, or a folder that has one.

    A `vocab.json` with a `merges.txt` beside it is a tokenizer too.

    Args:
        lowercase: for a `vocab.txt` only; by default what tokenizer_config.json beside it says, otherwise True.
        ends: the tokens that begin and end documents; by default the tokens that the files name.

    Raises:
        UserError: NO_INPUT if there is no tokenizer, DATA if it is damaged, USAGE if it lacks a token of `ends`.
    """
    try:
        file = _tokenizer_file(path)
        if file.suffix == ".txt":
            lowercase = _lowercase(file) if lowercase is None else lowercase
            tokenizer = read_wordpiece(file, lowercase, ends)
        elif file.suffix == ".model":
            tokenizer = read_sentencepiece(file, ends)
        else:
            tokenizer = read_tokenizer_json(file, ends)
    except OSError as error:
        raise io_error(error, path) from None
    if tokenizer.vocab_size > MOST_TOKENS:
        what = f"largest token id is {tokenizer.vocab_size - 1:,}"
        raise UserError(ExitCode.DATA, what, file, f"restore the file: a vocabulary has at most {MOST_TOKENS:,} tokens")
    return tokenizer


def _tokenizer_file(path: Path) -> Path:
    fix = (
        "give a vocab.txt, a SentencePiece .model, a tokenizer.json, a vocab.json with its merges.txt, "
        "or a folder with one of them"
    )
    if not path.exists():
        raise UserError(ExitCode.NO_INPUT, "tokenizer not found", path, fix)
    if path.is_dir():
        # Originals first: a tokenizer.json beside an original was made from it.
        for name in ("vocab.txt", "spiece.model", "tokenizer.model", "tokenizer.json"):
            if (path / name).is_file():
                return path / name
        if (path / VOCABULARY).is_file() and (path / MERGES).is_file():
            return path / VOCABULARY
        raise UserError(ExitCode.NO_INPUT, "no tokenizer in the folder", path, fix)
    if path.name in (VOCABULARY, MERGES):
        path = path.with_name(VOCABULARY)
        if missing := [file for file in (path, path.with_name(MERGES)) if not file.is_file()]:
            raise UserError(ExitCode.NO_INPUT, "tokenizer not found", missing[0], fix)
    if path.suffix not in (".txt", ".model", ".json"):
        raise UserError(ExitCode.DATA, "not a tokenizer of a known kind", path, fix)
    return path


def _lowercase(vocabulary: Path) -> bool:
    """Return whether the configuration beside a `vocab.txt` says to lower-case text."""
    path = vocabulary.with_name(CONFIG)
    lowercase = optional_object(path).get("do_lower_case", True)
    if not isinstance(lowercase, bool):
        fix = "restore it, or delete it for a lower-casing tokenizer"
        raise UserError(ExitCode.DATA, "do_lower_case cannot be read", path, fix)
    return lowercase
