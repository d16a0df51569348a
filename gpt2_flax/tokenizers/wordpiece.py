"""BERT WordPiece tokenizers from a `vocab.txt`, with the ids of `transformers.BertTokenizer`."""

import codecs
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.input_files import VOCABULARY_BYTES, read_whole
from gpt2_flax.tokenizers.bert_table import BertTable
from gpt2_flax.tokenizers.ragged_ids import RaggedIds
from gpt2_flax.tokenizers.special_tokens import FROM_FILES, Ends, named_tokens
from gpt2_flax.tokenizers.tokenizer_json import JsonTokenizer, tokenizer_spec

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "bos_token": "[CLS]",
    "eos_token": "[SEP]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
}
_ENDS = Ends(SPECIAL_TOKENS["bos_token"], SPECIAL_TOKENS["eos_token"])
MASK = "[MASK]"  # special if a vocabulary has it; not needed here
TABLE_PAYS_AFTER = 2**18  # characters; encoding them without a table takes about as long as building the table
LONGEST_WORD = 100  # characters; a longer word is [UNK], as in `transformers` (Google's own code says 200)

# Chinese characters, kana, and their punctuation and full-width forms, which are written without blanks between them.
_CJK = "\u2e80-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff—…“”‘’·"


class WordPieceTokenizer(JsonTokenizer):
    """The tokenizer of a BERT vocabulary.

    Args:
        vocabulary: the content of `vocab.txt`.
        where: the name of the vocabulary in errors.
        ends: the tokens that begin and end documents; by default [CLS] and [SEP].

    Raises:
        UserError: DATA if the vocabulary is damaged or ambiguous.
    """

    def __init__(self, vocabulary: bytes, where: object, lowercase: bool = True, ends: Ends = FROM_FILES):
        self.vocabulary, self._where, self._lowercase = vocabulary, str(where), lowercase
        self._encoded_characters = 0
        ids = read_vocabulary(vocabulary, where)
        trimmed = "\n".join(ids).encode()
        if vocabulary.removesuffix(b"\n") != trimmed:
            self.vocabulary = trimmed + b"\n"  # every program reads the same tokens from the saved file
        special_tokens = SPECIAL_TOKENS | ({"mask_token": MASK} if MASK in ids else {})
        given = {"bos_token": ends.bos, "eos_token": ends.eos}
        special_tokens |= {name: token for name, token in given.items() if token is not None}
        super().__init__(tokenizer_spec(_backend(ids, special_tokens, lowercase)), special_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return WordPieceTokenizer, (self.vocabulary, self._where, self._lowercase, self._ends)

    @property
    def fingerprint(self) -> str:
        settings = f"wordpiece lowercase={self._lowercase}\n"
        if self._ends != _ENDS:  # the fingerprints of old datasets do not have it
            settings += f"{self._ends}\n"
        return hashlib.sha256(settings.encode() + self.vocabulary).hexdigest()

    @property
    def _ends(self) -> Ends:
        return Ends(self.special_tokens["bos_token"], self.special_tokens["eos_token"])

    def encode_batch(self, texts: Sequence[str]) -> RaggedIds:
        # The table gives the same ids. A prompt does not wait until the table is built.
        self._encoded_characters += sum(map(len, texts))
        if self._encoded_characters < TABLE_PAYS_AFTER:
            return super().encode_batch(texts)
        encoded = self._table.encode(texts)
        return encoded if self._ends == _ENDS else self._without_special(encoded)  # no text gives [CLS] or [SEP]

    @cached_property
    def _table(self) -> BertTable:
        return BertTable(self._backend, self.vocab_size)

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        super().save(folder, model_max_length)
        (folder / "vocab.txt").write_bytes(self.vocabulary)

    def _config(self) -> dict[str, Any]:
        return super()._config() | {"do_lower_case": self._lowercase}  # what BertTokenizer reads


def read_wordpiece(path: Path, lowercase: bool, ends: Ends = FROM_FILES) -> WordPieceTokenizer:
    """Return the tokenizer of a `vocab.txt`; `named_tokens` gives its begin and end tokens, and its errors."""
    vocabulary = read_whole(path, VOCABULARY_BYTES)
    named = named_tokens(path, read_vocabulary(vocabulary, path), {*SPECIAL_TOKENS.values()}, ends)
    return WordPieceTokenizer(vocabulary, path, lowercase, Ends(named.get("bos_token"), named.get("eos_token")))


def read_vocabulary(content: bytes, where: object) -> dict[str, int]:
    """Return the id of each token in a `vocab.txt`, which has one token a line, in the order of ids.

    Only LF ends a line: some published vocabularies have the token U+2028, at which `str.splitlines` splits. Blanks
    after a token are removed, as by `transformers.BertTokenizer` 5, unless the line is nothing but blanks.

    Raises:
        UserError: DATA with the line of a byte order mark, bad UTF-8, a carriage return or a repeated token; DATA if a
            special token is missing.
    """
    if content.startswith(codecs.BOM_UTF8):
        raise _vocabulary_error("byte order mark in the vocabulary", where, 1, "save it as UTF-8 without BOM")
    lines = content.removesuffix(b"\n").split(b"\n")
    ids: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            token = line.decode("utf-8")
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02X})"
            raise _vocabulary_error(what, where, number, "restore the original file") from None
        if "\r" in token:
            raise _vocabulary_error("carriage return in the vocabulary", where, number, "save it with LF line ends")
        token = token.rstrip() or token
        if token in ids:
            what = f"token {quote(token)} twice in the vocabulary, first in line {ids[token] + 1}"
            raise _vocabulary_error(what, where, number, "ids would be ambiguous: restore the original file")
        ids[token] = number - 1
    if missing := [token for token in dict.fromkeys(SPECIAL_TOKENS.values()) if token not in ids]:
        what = f"vocabulary without {' '.join(missing)}"
        raise UserError(ExitCode.DATA, what, where, "give the vocab.txt of a BERT tokenizer")
    return ids


def bert_normalizer(lowercase: bool) -> normalizers.Normalizer:
    """Return BERT's normalizer, which removes control characters and puts blanks around Chinese characters.

    Lower-casing also removes accents.
    """
    return normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, lowercase=lowercase)


def _backend(ids: dict[str, int], special_tokens: dict[str, str], lowercase: bool) -> Tokenizer:
    unknown = special_tokens["unk_token"]
    backend = Tokenizer(models.WordPiece(ids, unk_token=unknown, max_input_chars_per_word=LONGEST_WORD))
    backend.normalizer = bert_normalizer(lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    joints = decoders.Replace(Regex(f"(?<=[{_CJK}]) | (?=[{_CJK}])"), "")
    backend.decoder = decoders.Sequence([decoders.WordPiece(prefix="##"), decoders.Fuse(), joints])
    tokens = sorted(set(special_tokens.values()), key=ids.__getitem__)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    return backend


def _vocabulary_error(what: str, where: object, line: int, fix: str) -> UserError:
    return UserError(ExitCode.DATA, what, f"{where}:{line}", fix)
