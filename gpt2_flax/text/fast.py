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

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.text.encoded import Encoded

# The begin, end, padding and unknown tokens of the families we know, by the names that `transformers` gives them.
FAMILIES = (
    {"bos_token": "[CLS]", "eos_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
    {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
)


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
        special = {token["id"] for token in self._spec["added_tokens"] if token["special"]} | set(ids.values())
        self._special_ids = np.array(sorted(special - {self.unk_id}), np.int32)

    def __reduce__(self) -> tuple[type, tuple[Mapping[str, Any], Mapping[str, str]]]:
        return FastTokenizer, (self._spec, self.special_tokens)

    @property
    def fingerprint(self) -> str:
        """Of the parsed file, so that neither its layout nor the version of `tokenizers` matters."""
        return hashlib.sha256(json.dumps(self._spec, sort_keys=True).encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> Encoded:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        encoded = Encoded.from_lists([encoding.ids for encoding in encodings], self.vocab_size)
        # A model may hold "<s>" as a piece of text too.
        special_T = np.isin(encoded.ids_T, self._special_ids)
        return encoded.select(~special_T) if special_T.any() else encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Leaves out the unknown token too where it is a special one, as `skip_special_tokens` in `transformers`."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def save(self, folder: Path, model_max_length: int | None = None) -> None:
        config = self._config() | ({} if model_max_length is None else {"model_max_length": model_max_length})
        _write_json(folder / "tokenizer.json", self._spec)
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "special_tokens_map.json", self.special_tokens)

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


def read_fast_tokenizer(path: Path) -> FastTokenizer:
    """Returns the tokenizer of a `tokenizer.json`; begin and end of document are found among its special tokens.

    Raises `UserError` (DATA) for a file that `tokenizers` does not understand or that has no such tokens.
    """
    try:
        spec = json.loads(path.read_bytes())
        added = {token["content"] for token in spec["added_tokens"]}
        tokenizers.Tokenizer.from_str(json.dumps(spec))
    except OSError:
        raise
    except Exception as error:  # `tokenizers` raises plain Exception
        raise UserError(ExitCode.DATA, "not a tokenizer.json", path, f"check the file: {quote(str(error))}") from None
    for family in FAMILIES:
        if {family["bos_token"], family["eos_token"]} <= added:
            return FastTokenizer(spec, {name: token for name, token in family.items() if token in added})
    fix = "it needs [CLS] and [SEP], <s> and </s>, or <|endoftext|> among its added tokens"
    raise UserError(ExitCode.DATA, "tokenizer without begin and end of document", path, fix)


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
