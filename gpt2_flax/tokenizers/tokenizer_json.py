"""Tokenizers that a `tokenizer.json` describes, run by the `tokenizers` library, and their `transformers` folders.

A saved folder holds `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`. The post-processor puts
the begin token before a prompt, and nothing after it: after an end token, a model would start another document.
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
from gpt2_flax.folders import write_json
from gpt2_flax.input_files import VOCABULARY_BYTES, read_object
from gpt2_flax.tokenizers.ragged_ids import RaggedIds
from gpt2_flax.tokenizers.special_tokens import (
    CONFIG,
    FROM_FILES,
    SPECIAL_TOKENS_MAP,
    Ends,
    named_tokens,
    optional_object,
)

# The begin, end, padding and unknown tokens of known families, by their names in `transformers`.
FAMILIES = (
    {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
    {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
    {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
)
_KNOWN_ENDS = [(family["bos_token"], family["eos_token"]) for family in FAMILIES]

VOCABULARY, MERGES = "vocab.json", "merges.txt"  # byte-level BPE, as GPT-2 was published


class JsonTokenizer:
    """A `tokenizer.Tokenizer` made from the content of a `tokenizer.json`.

    Args:
        spec: the content.
        special_tokens: token by name, as in special_tokens_map.json; "bos_token" and "eos_token" must be there.
    """

    def __init__(self, spec: Mapping[str, Any], special_tokens: Mapping[str, str]):
        self._spec = dict(spec, truncation=None, padding=None)
        backend = tokenizers.Tokenizer.from_str(json.dumps(self._spec))
        backend.encode_special_tokens = True  # "[CLS]" written in a text is text
        self._backend, self.special_tokens = backend, dict(special_tokens)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        ids = {name: vocabulary[token] for name, token in special_tokens.items()}
        self.bos_id, self.eos_id = ids["bos_token"], ids["eos_token"]
        self.pad_id, self.unk_id = ids.get("pad_token"), ids.get("unk_token")
        self._spec["post_processor"] = _begin_of_document(special_tokens["bos_token"], self.bos_id)
        self.vocab_size = max(vocabulary.values()) + 1
        special_ids = {vocabulary[token["content"]] for token in self._spec["added_tokens"] if token["special"]}
        special_ids |= set(ids.values())
        self._special_ids = np.array(sorted(special_ids - {self.unk_id}), np.int32)

    def __reduce__(self) -> tuple[Any, ...]:
        return JsonTokenizer, (self._spec, self.special_tokens)

    @property
    def fingerprint(self) -> str:
        """A sha256 of the parsed file, so that neither its layout nor the version of `tokenizers` matters."""
        digest = hashlib.sha256(json.dumps(self._spec, sort_keys=True).encode())
        bos, eos = self.special_tokens["bos_token"], self.special_tokens["eos_token"]
        if (bos, eos) not in _KNOWN_ENDS:  # the post-processor has the begin token, which implies a known end
            digest.update(f"\neos {eos}".encode())
        return digest.hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> RaggedIds:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        encoded = RaggedIds.from_lists([encoding.ids for encoding in encodings], self.vocab_size)
        return self._without_special(encoded)

    def _without_special(self, encoded: RaggedIds) -> RaggedIds:
        """Remove special ids: the model of a tokenizer may also produce "<s>" from text."""
        special_T = np.isin(encoded.ids_T, self._special_ids)
        return encoded.select(~special_T) if special_T.any() else encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids` without special tokens. The unknown token, if special, is left out too."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        config = self._config() | ({} if model_max_length is None else {"model_max_length": model_max_length})
        write_json(folder / "tokenizer.json", self._spec)
        write_json(folder / CONFIG, config)
        write_json(folder / SPECIAL_TOKENS_MAP, self.special_tokens)

    def _config(self) -> dict[str, Any]:
        """Return the content of tokenizer_config.json."""
        return {
            # transformers 5 rebuilds tokenizers of most other classes; BertTokenizer would put [SEP] after a prompt.
            # `BertTokenizer.from_pretrained` of 4.57 warns about this class, but gives the right ids.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add an embedding for token_type_ids
            "padding_side": "left",  # with "right", generation would continue after the padding
            "pad_token": self.special_tokens["eos_token"],  # unless there is another; as in generation_config.json
            **self.special_tokens,
        }


def read_tokenizer_json(path: Path, ends: Ends = FROM_FILES) -> JsonTokenizer:
    """Return the tokenizer of a `tokenizer.json`, or of a `vocab.json` that has a `merges.txt` beside it.

    The begin and end tokens come from `named_tokens`, otherwise from a known family. Without a begin token, the end
    token begins documents too.

    Raises:
        UserError: DATA if `tokenizers` cannot read the file, or nothing names an end token; as `named_tokens`.
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
        named.pop("unk_token", None)  # as in the folder of GPT-2, to which no text is unknown
    pair = (named["bos_token"], named["eos_token"])
    if pair not in _KNOWN_ENDS or not added.keys() >= set(pair):
        spec["added_tokens"] = _with_special(added, ids, pair)
    return JsonTokenizer(spec, named)


def _check_ids(ids: Mapping[str, int], added: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for ids that programs would read differently, or that show a damaged file."""
    tokens: dict[int, str] = {}
    for token, number in ids.items():
        if (other := tokens.setdefault(number, token)) != token:
            raise ValueError(f"tokens {other!r} and {token!r} have the same id {number}")
    for entry in added:  # `tokenizers` changes the id of an added token that does not follow the vocabulary
        if (number := ids.get(entry["content"])) != entry["id"]:
            raise ValueError(f"added token {entry['content']!r} cannot have the id {entry['id']}, but {number}")
    if (largest := max(tokens, default=0)) >= 2 * len(tokens):
        raise ValueError(f"the largest id is {largest}, but there are {len(tokens)} tokens")


def _with_special(added: dict[str, Any], ids: Mapping[str, int], tokens: Sequence[str]) -> list[dict[str, Any]]:
    """Return the added tokens with `tokens` among them as special tokens, which text is never encoded as."""
    new = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = {token: {"id": ids[token], "content": token} | new | added.get(token, {}) for token in tokens}
    special = {token: entry | {"special": True} for token, entry in special.items()}
    return sorted([*(added | special).values()], key=lambda entry: entry["id"])


def _byte_level_spec(path: Path) -> dict[str, Any]:
    """Return the tokenizer.json that `transformers` makes from the vocab.json and merges.txt of a GPT-2."""
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(path), str(path.with_name(MERGES))))
    config = optional_object(path.with_name(CONFIG))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    ids = backend.get_vocab()
    known = {token for ends in _KNOWN_ENDS for token in ends if token in ids}
    backend.add_special_tokens(sorted(known, key=ids.__getitem__))
    # Tokens added to the vocabulary: old folders give their ids, newer folders also their options.
    added = {index: {"content": token} for token, index in optional_object(path.with_name("added_tokens.json")).items()}
    added |= {int(index): entry for index, entry in config.get("added_tokens_decoder", {}).items()}
    for index, entry in sorted(added.items()):
        options = {name: value for name, value in entry.items() if name not in ("content", "__type")}
        backend.add_tokens([tokenizers.AddedToken(entry["content"], **options)])
        if backend.token_to_id(entry["content"]) != index:
            raise ValueError(f"added token {entry['content']!r} cannot have the id {index}")
    return tokenizer_spec(backend)


def tokenizer_spec(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """Return the content of the `tokenizer.json` of `backend`."""
    return json.loads(backend.to_str())


def _begin_of_document(token: str, token_id: int) -> dict[str, Any]:
    """Return the post-processor that puts `token` before each text, or pair of texts."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
