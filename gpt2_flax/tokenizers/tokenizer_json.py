"""Tokenizers that a `tokenizer.json` describes, run by the `tokenizers` library, and their `transformers` folders.

A saved folder holds `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`. The post-processor puts
the begin-of-document token before a prompt and nothing after it: a model that has seen the end token starts another
document.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.input_files import VOCABULARY_BYTES, read_object
from gpt2_flax.tokenizers.ragged_ids import Encoded
from gpt2_flax.tokenizers.special_tokens import (
    CONFIG,
    FROM_FILES,
    SPECIAL_TOKENS_MAP,
    Ends,
    named_tokens,
    optional_object,
)

# The begin, end, padding and unknown tokens of the families we know, by the names that `transformers` gives them.
FAMILIES = (
    {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
    {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
    {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
)
_KNOWN_ENDS = [(family["bos_token"], family["eos_token"]) for family in FAMILIES]

VOCABULARY, MERGES = "vocab.json", "merges.txt"  # of byte-level BPE, as GPT-2 was published


class FastTokenizer:
    """A tokenizer made from `spec`, the content of a `tokenizer.json`; see `text.tokenizer.Tokenizer` for the members.

    `special_tokens` has the names and tokens of special_tokens_map.json, with `bos_token` and `eos_token` at least.
    """

    def __init__(self, spec: Mapping[str, Any], special_tokens: Mapping[str, str]):
        self._spec = dict(spec, truncation=None, padding=None)
        backend = tokenizers.Tokenizer.from_str(json.dumps(self._spec))
        backend.encode_special_tokens = True  # "[CLS]" written in a text is text
        self._backend, self.special_tokens = backend, dict(special_tokens)
        ids = {name: backend.token_to_id(token) for name, token in special_tokens.items()}
        self.bos_id, self.eos_id = ids["bos_token"], ids["eos_token"]
        self.pad_id, self.unk_id = ids.get("pad_token"), ids.get("unk_token")
        self._spec["post_processor"] = _begin_of_document(special_tokens["bos_token"], self.bos_id)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        special = {token["content"] for token in self._spec["added_tokens"] if token["special"]}
        special_ids = set(map(backend.token_to_id, special)) | set(ids.values())
        self._special_ids = np.array(sorted(special_ids - {self.unk_id}), np.int32)

    def __reduce__(self) -> tuple[type, tuple[Mapping[str, Any], Mapping[str, str]]]:
        return FastTokenizer, (self._spec, self.special_tokens)

    @property
    def fingerprint(self) -> str:
        """Of the parsed file, so that neither its layout nor the version of `tokenizers` matters."""
        digest = hashlib.sha256(json.dumps(self._spec, sort_keys=True).encode())
        bos, eos = self.special_tokens["bos_token"], self.special_tokens["eos_token"]
        if (bos, eos) not in _KNOWN_ENDS:  # the file has the begin in its post-processor; a known begin tells the end
            digest.update(f"\neos {eos}".encode())
        return digest.hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        encoded = Encoded.from_lists([encoding.ids for encoding in encodings], self.vocab_size)
        return self._without_special(encoded)

    def _without_special(self, encoded: Encoded) -> Encoded:
        """A model may hold "<s>" as a piece of text too."""
        special_T = np.isin(encoded.ids_T, self._special_ids)
        return encoded.select(~special_T) if special_T.any() else encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Leaves out the unknown token too where it is a special one, as `skip_special_tokens` in `transformers`."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        config = self._config() | ({} if model_max_length is None else {"model_max_length": model_max_length})
        _write_json(folder / "tokenizer.json", self._spec)
        _write_json(folder / CONFIG, config)
        _write_json(folder / SPECIAL_TOKENS_MAP, self.special_tokens)

    def _config(self) -> dict[str, Any]:
        """What tokenizer_config.json holds."""
        return {
            # transformers 5 makes tokenizers of most other classes anew, BertTokenizer with [SEP] behind every prompt.
            # The price: `BertTokenizer.from_pretrained` of 4.57, which does the right thing, warns of another class.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add an embedding for token_type_ids
            "padding_side": "left",  # on the right, a batch would be continued behind its padding
            "pad_token": self.special_tokens["eos_token"],  # where there is no other, as in generation_config.json
            **self.special_tokens,
        }


def read_fast_tokenizer(path: Path, ends: Ends = FROM_FILES) -> FastTokenizer:
    """Return the tokenizer of a `tokenizer.json`, or of a `vocab.json` that has a `merges.txt` beside it.

    `named_tokens` gives the begin and end tokens, else a known family does. Without a begin token the end token serves.
    Raises `UserError`: DATA for a file that `tokenizers` does not understand, or whose end of document nothing tells,
    and as `named_tokens`.
    """
    try:
        spec = _byte_level_spec(path) if path.name == VOCABULARY else read_object(path, VOCABULARY_BYTES)
        ids = tokenizers.Tokenizer.from_str(json.dumps(spec)).get_vocab(with_added_tokens=True)
        _check_ids(ids, spec["added_tokens"])
        added = {token["content"]: token for token in spec["added_tokens"]}
    except (OSError, UserError):
        raise
    except Exception as error:  # `tokenizers` raises plain Exception
        what = f"not a {path.name} of `tokenizers`"
        raise UserError(ExitCode.DATA, what, path, f"check the file: {quote(str(error))}") from None
    named = named_tokens(path, ids, {token for token in added if added[token]["special"] and token in ids}, ends)
    given = {name: named[name] for name in ("bos_token", "eos_token") if name in named}
    for family in FAMILIES:
        if given.items() <= family.items() and {family["bos_token"], family["eos_token"]} <= added.keys():
            named = {name: token for name, token in family.items() if token in added} | named
            break
    if "eos_token" not in named:
        fix = "name tokens of its vocabulary: --bos TOKEN --eos TOKEN"
        raise UserError(ExitCode.DATA, "tokenizer without begin and end of document", path, fix)
    named = {"bos_token": named["eos_token"]} | named
    if named.get("unk_token") in (named["bos_token"], named["eos_token"], named.get("pad_token")):
        named.pop("unk_token", None)  # as in the folder of GPT-2, whose vocabulary leaves nothing unknown
    pair = (named["bos_token"], named["eos_token"])
    if pair not in _KNOWN_ENDS or not added.keys() >= set(pair):
        spec["added_tokens"] = _with_special(added, ids, pair)
    return FastTokenizer(spec, named)


def _check_ids(ids: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError for ids that programs would read in different ways, or that a damaged file has."""
    tokens: dict[int, str] = {}
    for token, number in ids.items():
        if (other := tokens.setdefault(number, token)) != token:
            raise ValueError(f"tokens {other!r} and {token!r} have the same id {number}")
    for entry in added:  # `tokenizers` gives what does not follow the vocabulary another id
        if (number := ids.get(entry["content"])) != entry["id"]:
            raise ValueError(f"added token {entry['content']!r} cannot have the id {entry['id']}, but {number}")
    if (largest := max(tokens, default=0)) >= 2 * len(tokens):
        raise ValueError(f"the largest id is {largest}, but there are {len(tokens)} tokens")


def _with_special(added: Mapping[str, Any], ids: Mapping[str, int], tokens: Sequence[str]) -> list[dict[str, Any]]:
    """Return the added tokens with `tokens` among them as special ones, which no text can hold."""
    new = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = {token: {"id": ids[token], "content": token} | new | added.get(token, {}) for token in tokens}
    special = {token: entry | {"special": True} for token, entry in special.items()}
    return sorted([*(added | special).values()], key=lambda entry: entry["id"])


def _byte_level_spec(path: Path) -> dict[str, Any]:
    """Return the tokenizer.json that `transformers` makes of the vocab.json and merges.txt of a GPT-2."""
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(path), str(path.with_name(MERGES))))
    config = optional_object(path.with_name(CONFIG))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    known = [token for ends in _KNOWN_ENDS for token in ends if backend.token_to_id(token) is not None]
    backend.add_special_tokens(sorted(set(known), key=backend.token_to_id))
    # Tokens that were added to the vocabulary: in old folders with their ids, in newer ones as `tokenizers` has them.
    added = {index: {"content": token} for token, index in optional_object(path.with_name("added_tokens.json")).items()}
    added |= {int(index): entry for index, entry in config.get("added_tokens_decoder", {}).items()}
    for index, entry in sorted(added.items()):
        options = {name: value for name, value in entry.items() if name not in ("content", "__type")}
        backend.add_tokens([tokenizers.AddedToken(entry["content"], **options)])
        if backend.token_to_id(entry["content"]) != index:
            raise ValueError(f"added token {entry['content']!r} cannot have the id {index}")
    return tokenizer_spec(backend)


def tokenizer_spec(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Returns what the `tokenizer.json` of `backend` holds."""
    return json.loads(backend.to_str())


def _begin_of_document(token: str, token_id: int) -> dict[str, Any]:
    """The post-processor that puts `token` before every text, or pair of texts."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
