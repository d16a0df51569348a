"""GGUF, the one file that llama.cpp and its relatives read: sizes, tokenizer and weights.

Matrices have the type of the export. Vectors and positions are float32, as llama.cpp wants them, with the same values:
the model is that of the safetensors file, number for number.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from sentencepiece import sentencepiece_model_pb2 as protobuf

from gpt2_flax.config import ModelConfig
from gpt2_flax.errors import ExitCode, UserError, missing_package
from gpt2_flax.export.weight_files import Dtype
from gpt2_flax.tokenizers.sentencepiece import BLANK, SentencePieceTokenizer
from gpt2_flax.tokenizers.tokenizer import Tokenizer
from gpt2_flax.tokenizers.wordpiece import MASK, SPECIAL_TOKENS, WordPieceTokenizer, read_vocabulary

GGUF = "model.gguf"

_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
_EMBEDDINGS = ("token_embd.weight", "position_embd.weight", "output.weight")  # the matrices that are not transposed


class _Token(NamedTuple):
    """A row of the vocabulary."""

    text: str
    type: int
    score: float = -1e9  # of SentencePiece; that of a row without a token, which no text must become


def write_gguf(
    folder: Path,
    state_dict: Mapping[str, np.ndarray],
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: Dtype,
    name: str,
) -> None:
    """Writes model.gguf into `folder`, which holds the tokenizer's files already, and compares what it reads there.

    `state_dict`: tensors in `dtype` under the names of `transformers`. One transposed matrix is in memory at a time.
    Raises `UserError`: USAGE when `gguf` is not installed or knows no tokenizer of this kind, IO when what was written
    differs.
    """
    path = folder / GGUF
    gguf = import_gguf(path)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    _add_tokenizer(gguf, writer, folder, tokenizer, config.vocab_size)
    try:
        for name, array in _tensors(gguf, state_dict, config, copy=False):
            raw = gguf.GGMLQuantizationType.BF16 if array.dtype == ml_dtypes.bfloat16 else None
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, array in _tensors(gguf, state_dict, config):
            writer.write_tensor_data(array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array)
    finally:
        writer.close()
    _compare(gguf, path, state_dict, config)


def import_gguf(where: object) -> ModuleType:
    """Returns the package `gguf`. Raises `UserError` (USAGE) when it is not installed."""
    try:
        import gguf
    except ImportError:
        raise missing_package("GGUF", "gguf", "gguf", where) from None
    return gguf


def remarks(tokenizer: Tokenizer) -> str:
    """Returns what one must know to get from llama.cpp what `transformers` gives, empty if nothing: Markdown."""
    if isinstance(tokenizer, WordPieceTokenizer):
        return f"""\
With a BERT vocabulary llama.cpp puts `[SEP]`, the end of a document, behind a prompt that is a text, as
`llama-completion` takes it, and the model goes on as if a new document began. A list is taken as it is:
{tokenizer.bos_id} is `[CLS]`. What comes back has blanks between Chinese characters.
"""
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = tokenizer.proto
        if proto.trainer_spec.byte_fallback and _sentencepiece_kind(proto) == "t5":
            return """\
Characters that the vocabulary lacks are `<unk>` in llama.cpp, and bytes in `transformers`. Line ends, tabs and all else
that is ASCII is the same in both.
"""
    return ""


def _tensors(
    gguf: ModuleType, state_dict: Mapping[str, np.ndarray], config: ModelConfig, copy: bool = True
) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays as in the file; without `copy` only their shapes and types are right."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for theirs, array in state_dict.items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise RuntimeError(f"GGUF has no name for {theirs}")
        if array.ndim == 2 and name not in _EMBEDDINGS:  # Conv1D is [in, out], theirs is [out, in]
            array = np.ascontiguousarray(array.T) if copy else array.T
        if array.ndim == 1 or name == "position_embd.weight":
            array = array.astype(np.float32)
        yield name, array


def _add_tokenizer(gguf: ModuleType, writer: Any, folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    kinds = {"vocab.txt": _wordpiece, "spiece.model": _sentencepiece, "tokenizer.json": _byte_level}
    file, kind = next((folder / file, kind) for file, kind in kinds.items() if (folder / file).is_file())
    tokens = kind(gguf, writer, file)
    # Rows of the embedding that no token has need a name too.
    for index in range(vocab_size):
        tokens.setdefault(index, _Token(f"[PAD{index}]", gguf.TokenType.UNUSED))
    ordered = [tokens[index] for index in range(vocab_size)]
    if len({token.text for token in ordered}) < vocab_size:  # llama.cpp ends with a failed assertion
        raise _unknown_kind("GGUF cannot hold two tokens of one name", file)
    writer.add_token_list([token.text for token in ordered])
    writer.add_token_types([int(token.type) for token in ordered])
    if kind is _sentencepiece:
        writer.add_token_scores([token.score for token in ordered])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.unk_id is not None:
        writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_pad_token_id(tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)  # the end of a document is no part of a prompt


def _wordpiece(gguf: ModuleType, writer: Any, file: Path) -> dict[int, _Token]:
    """llama.cpp marks the begin of a word instead of what goes on in it.

    Its ids are those of BERT, but for words of more than 100 characters, some vertical blanks, and marks and
    punctuation of scripts that one of the two does not know.
    """
    ids = read_vocabulary(file.read_bytes(), file)
    special = {*SPECIAL_TOKENS.values(), MASK} & ids.keys()
    tokens = {}
    for token, index in ids.items():
        inner = token.removeprefix("##")
        if token in special:
            tokens[index] = _Token(token, gguf.TokenType.CONTROL)
        elif token == "":  # an empty line; its name would be the mark alone and be found in every unknown word
            tokens[index] = _Token(f"[EMPTY{index}]", gguf.TokenType.UNUSED)
        elif inner in ("", token):
            tokens[index] = _Token(BLANK + token, gguf.TokenType.NORMAL)
        elif inner.startswith(BLANK) or inner in special:  # likewise; no word of a text has "##" in it
            tokens[index] = _Token(token, gguf.TokenType.NORMAL)
        else:
            tokens[index] = _Token(inner, gguf.TokenType.NORMAL)
    lowercase = json.loads((file.parent / "tokenizer_config.json").read_bytes())["do_lower_case"]
    writer.add_tokenizer_model("bert")
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", lowercase)
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", lowercase)
    writer.add_token_type_count(1)
    writer.add_sep_token_id(ids[SPECIAL_TOKENS["sep_token"]])
    writer.add_add_sep_token(False)  # in vain: see `remarks`
    if MASK in ids:
        writer.add_mask_token_id(ids[MASK])
    return tokens


def _sentencepiece(gguf: ModuleType, writer: Any, file: Path) -> dict[int, _Token]:
    proto = protobuf.ModelProto.FromString(file.read_bytes())
    kind = _sentencepiece_kind(proto)
    if kind is None:
        raise _unknown_kind("llama.cpp cannot tokenize as this SentencePiece model does", file)
    writer.add_tokenizer_model(kind)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)
    if proto.normalizer_spec.precompiled_charsmap:
        writer.add_precompiled_charsmap(proto.normalizer_spec.precompiled_charsmap)
    # Both number their types alike: normal, unknown, control, user-defined, unused, byte.
    tokens = {index: _Token(piece.piece, piece.type, piece.score) for index, piece in enumerate(proto.pieces)}
    return _for_best_score(gguf, tokens) if kind == "t5" else tokens


def _sentencepiece_kind(proto: protobuf.ModelProto) -> str | None:
    """Returns which tokenizer of llama.cpp gives the ids of a SentencePiece model, None if there is none.

    "llama" merges the pair that scores best, leaves the text as it is, ends with an error when it needs the bytes of a
    character and has none. "t5" finds the segmentation that scores best, and normalizes; it has no use for bytes.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    changes_text = bool(normalizer.precompiled_charsmap) or normalizer.remove_extra_whitespaces
    if trainer.model_type != trainer.UNIGRAM and trainer.byte_fallback and not changes_text:
        return "llama"
    # It puts a blank before a text whose extra blanks it removes, also where the model wants none.
    blanks = normalizer.add_dummy_prefix or not normalizer.remove_extra_whitespaces
    return "t5" if trainer.model_type != trainer.BPE and blanks else None


def _for_best_score(gguf: ModuleType, tokens: Mapping[int, _Token]) -> dict[int, _Token]:
    """Returns the tokens as "t5" of llama.cpp needs them.

    - It finds no byte tokens, but line ends and tabs are one in most models: they become tokens of text, with the score
      that an unknown character has.
    - User-defined ones would make it cut other characters that begin with the same byte.
    """
    normal = gguf.TokenType.NORMAL
    known = {token.text for token in tokens.values()}
    unknown = min(token.score for token in tokens.values() if token.type == normal) - 10
    changed = {}
    for index, token in tokens.items():
        if token.type == gguf.TokenType.USER_DEFINED:
            changed[index] = _Token(token.text, normal, -0.1)
        elif token.type == gguf.TokenType.BYTE:
            character = chr(int(token.text[3:5], 16))
            if "\0" < character < "\x80" and character != " " and character not in known:
                changed[index] = _Token(character, normal, unknown)
    return {**tokens, **changed}


def _byte_level(gguf: ModuleType, writer: Any, file: Path) -> dict[int, _Token]:
    spec = json.loads(file.read_bytes())
    model, pre_tokenizer = spec["model"], spec["pre_tokenizer"] or {}
    changed = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")
    if (
        (model["type"], pre_tokenizer.get("type"), spec["normalizer"]) != ("BPE", "ByteLevel", None)
        or pre_tokenizer["add_prefix_space"]
        or not pre_tokenizer.get("use_regex", True)
        or any(model.get(field) for field in changed)
    ):
        raise _unknown_kind("GGUF has no tokenizer of this kind", file)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    tokens = {index: _Token(token, gguf.TokenType.NORMAL) for token, index in model["vocab"].items()}
    for added in spec["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = _Token(added["content"], kind)
    return tokens


def _unknown_kind(what: str, file: Path) -> UserError:
    fix = (
        "export safetensors; GGUF takes a vocab.txt, a byte-level BPE as that of GPT-2, and a SentencePiece model that "
        "is a unigram, or a BPE that leaves text as it is and has bytes for rare characters"
    )
    return UserError(ExitCode.USAGE, what, file.name, fix)


def _compare(gguf: ModuleType, path: Path, state_dict: Mapping[str, np.ndarray], config: ModelConfig) -> None:
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    expected = dict.fromkeys(name for name, _ in _tensors(gguf, state_dict, config, copy=False))
    wrong = sorted(written.keys() ^ expected.keys())
    for name, array in _tensors(gguf, state_dict, config):
        if name in written:
            found = written[name].data
            found = found.view(ml_dtypes.bfloat16) if array.dtype == ml_dtypes.bfloat16 else found
            if found.dtype != array.dtype or found.tobytes() != array.tobytes() or found.shape != array.shape:
                wrong.append(name)
    if wrong:
        fix = "check the disk, then run the same command again"
        raise UserError(ExitCode.IO, f"what was written differs from the model: {wrong[0]}", path, fix)
