"""Write GGUF, the single file that llama.cpp and related programs read: sizes, tokenizer and weights.

Matrices have the dtype of the export. Vectors and position embeddings are float32, as llama.cpp requires; their values
are the same as in the safetensors file.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from sentencepiece import sentencepiece_model_pb2 as protobuf

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError, missing_package
from gpt2_flax.export.weight_files import Dtype
from gpt2_flax.tokenizers.sentencepiece import BLANK, SentencePieceTokenizer
from gpt2_flax.tokenizers.tokenizer import Tokenizer
from gpt2_flax.tokenizers.wordpiece import MASK, SPECIAL_TOKENS, WordPieceTokenizer, read_vocabulary

GGUF = "model.gguf"

_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
_EMBEDDINGS = ("token_embd.weight", "position_embd.weight", "output.weight")  # matrices that are not transposed


class _Token(NamedTuple):
    """A token of the vocabulary; `score` is for SentencePiece. The default score keeps a token out of every text."""

    text: str
    type: int
    score: float = -1e9


def check_installed(where: object) -> None:
    """Raise `UserError` (USAGE) if the package `gguf` is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise missing_package("GGUF", "gguf", "gguf", where) from None


def write_file(
    folder: Path,
    state_dict: Mapping[str, np.ndarray],
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: Dtype,
    name: str,
) -> None:
    """Write model.gguf, read it back and compare. One transposed matrix is in memory at a time.

    Args:
        folder: Holds the files of the tokenizer already.
        state_dict: Tensors in `dtype` under the names of `transformers`.

    Raises:
        UserError: USAGE if `gguf` is not installed or does not support the tokenizer; IO if other numbers were read.
    """
    check_installed(path := folder / GGUF)
    import gguf

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
    _add_tokenizer(writer, folder, tokenizer, config.vocab_size)
    try:
        for name, array in _tensors(state_dict, config, copy=False):
            raw = gguf.GGMLQuantizationType.BF16 if array.dtype == ml_dtypes.bfloat16 else None
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, array in _tensors(state_dict, config):
            writer.write_tensor_data(array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array)
    finally:
        writer.close()
    _check_written(path, state_dict, config)


def remarks(tokenizer: Tokenizer) -> str:
    """Return Markdown about differences between the tokenizers of llama.cpp and `transformers`, or an empty text."""
    if isinstance(tokenizer, WordPieceTokenizer):
        return f"""\
With a BERT vocabulary llama.cpp puts `[SEP]`, the end of a document, behind a prompt that is a text, as
`llama-completion` takes it, and the model goes on as if a new document began. A list is taken as it is:
{tokenizer.bos_id} is `[CLS]`. What comes back has blanks between Chinese characters.
"""
    if not isinstance(tokenizer, SentencePieceTokenizer) or not tokenizer.proto.trainer_spec.byte_fallback:
        return ""
    if _sentencepiece_kind(tokenizer.proto) != "t5":
        return ""
    return """\
Characters that the vocabulary lacks are `<unk>` in llama.cpp, and bytes in `transformers`. Line ends, tabs and all else
that is ASCII is the same in both.
"""


def _tensors(
    state_dict: Mapping[str, np.ndarray], config: ModelConfig, copy: bool = True
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and arrays of the file; without `copy` only shapes and dtypes are right."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for theirs, array in state_dict.items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise RuntimeError(f"GGUF has no name for {theirs}")
        if array.ndim == 2 and name not in _EMBEDDINGS:  # a Conv1D of transformers is [in, out], GGUF has [out, in]
            array = np.ascontiguousarray(array.T) if copy else array.T
        if array.ndim == 1 or name == "position_embd.weight":
            array = array.astype(np.float32)
        yield name, array


def _add_tokenizer(writer: Any, folder: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    import gguf

    kinds = {"vocab.txt": _wordpiece, "spiece.model": _sentencepiece, "tokenizer.json": _byte_level}
    file, kind = next((folder / file, kind) for file, kind in kinds.items() if (folder / file).is_file())
    tokens = kind(writer, file)
    # Rows of the embedding without a token need a name too.
    ordered = [tokens.get(row, _Token(f"[PAD{row}]", gguf.TokenType.UNUSED)) for row in range(vocab_size)]
    if len({token.text for token in ordered}) < vocab_size:  # llama.cpp would end with a failed assertion
        raise _not_supported("GGUF cannot hold two tokens of one name", file)
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
    writer.add_add_eos_token(False)  # a prompt does not end a document


def _wordpiece(writer: Any, file: Path) -> dict[int, _Token]:
    """Return the tokens of a BERT vocabulary. llama.cpp marks the start of a word, BERT its continuation.

    llama.cpp gives the ids of BERT except for words of more than 100 characters, some vertical blanks, and marks and
    punctuation of scripts that one of the two does not know.
    """
    import gguf

    ids = read_vocabulary(file.read_bytes(), file)
    special = {*SPECIAL_TOKENS.values(), MASK} & ids.keys()
    tokens = {}
    for token, index in ids.items():
        inner = token.removeprefix("##")
        if token in special:
            tokens[index] = _Token(token, gguf.TokenType.CONTROL)
        elif token == "":  # an empty line; the mark of a word alone would be found in every unknown word
            tokens[index] = _Token(f"[EMPTY{index}]", gguf.TokenType.UNUSED)
        elif inner in ("", token):
            tokens[index] = _Token(BLANK + token, gguf.TokenType.NORMAL)
        elif inner.startswith(BLANK) or inner in special:  # keep the "##", which no word of a text contains
            tokens[index] = _Token(token, gguf.TokenType.NORMAL)
        else:
            tokens[index] = _Token(inner, gguf.TokenType.NORMAL)
    lowercase = json.loads((file.parent / "tokenizer_config.json").read_bytes())["do_lower_case"]
    writer.add_tokenizer_model("bert")
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", lowercase)
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", lowercase)
    writer.add_token_type_count(1)
    writer.add_sep_token_id(ids[SPECIAL_TOKENS["sep_token"]])
    writer.add_add_sep_token(False)  # llama.cpp ignores this: see `remarks`
    if MASK in ids:
        writer.add_mask_token_id(ids[MASK])
    return tokens


def _sentencepiece(writer: Any, file: Path) -> dict[int, _Token]:
    proto = protobuf.ModelProto.FromString(file.read_bytes())  # pyright: ignore[reportAttributeAccessIssue] - no stub
    kind = _sentencepiece_kind(proto)
    if kind is None:
        raise _not_supported("llama.cpp cannot tokenize as this SentencePiece model does", file)
    writer.add_tokenizer_model(kind)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)
    if proto.normalizer_spec.precompiled_charsmap:
        writer.add_precompiled_charsmap(proto.normalizer_spec.precompiled_charsmap)
    # Both number their types alike: normal, unknown, control, user-defined, unused, byte.
    tokens = {index: _Token(piece.piece, piece.type, piece.score) for index, piece in enumerate(proto.pieces)}
    return _for_best_score(tokens) if kind == "t5" else tokens


def _sentencepiece_kind(proto: Any) -> str | None:
    """Return the tokenizer of llama.cpp that gives the ids of a SentencePiece `ModelProto`, None if there is none.

    "llama" merges the pair with the best score. It does not normalize, and fails on an unknown character if there are
    no byte tokens. "t5" finds the segmentation with the best score and normalizes, but does not use byte tokens.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    normalizes = bool(normalizer.precompiled_charsmap) or normalizer.remove_extra_whitespaces
    if trainer.model_type != trainer.UNIGRAM and trainer.byte_fallback and not normalizes:
        return "llama"
    # "t5" puts a blank before a text whose extra blanks it removes, even if the model does not.
    blanks = normalizer.add_dummy_prefix or not normalizer.remove_extra_whitespaces
    return "t5" if trainer.model_type != trainer.BPE and blanks else None


def _for_best_score(tokens: Mapping[int, _Token]) -> dict[int, _Token]:
    """Return the tokens changed for "t5" of llama.cpp.

    - "t5" does not use byte tokens, but line ends and tabs are byte tokens in most models. ASCII bytes become text
      tokens with the score of an unknown character.
    - User-defined tokens would make "t5" split other characters that begin with the same byte. They become normal.
    """
    from gguf import TokenType

    known = {token.text for token in tokens.values()}
    unknown = min(token.score for token in tokens.values() if token.type == TokenType.NORMAL) - 10
    changed = {}
    for index, token in tokens.items():
        if token.type == TokenType.USER_DEFINED:
            changed[index] = _Token(token.text, TokenType.NORMAL, -0.1)
        elif token.type == TokenType.BYTE:
            character = chr(int(token.text[3:5], 16))
            if "\0" < character < "\x80" and character != " " and character not in known:
                changed[index] = _Token(character, TokenType.NORMAL, unknown)
    return {**tokens, **changed}


def _byte_level(writer: Any, file: Path) -> dict[int, _Token]:
    from gguf import TokenType

    spec = json.loads(file.read_bytes())
    model, pre_tokenizer = spec["model"], spec["pre_tokenizer"] or {}
    changed = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "dropout")
    if (
        (model["type"], pre_tokenizer.get("type"), spec["normalizer"]) != ("BPE", "ByteLevel", None)
        or pre_tokenizer["add_prefix_space"]
        or not pre_tokenizer.get("use_regex", True)
        or any(model.get(field) for field in changed)
    ):
        raise _not_supported("GGUF has no tokenizer of this kind", file)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    tokens = {index: _Token(token, TokenType.NORMAL) for token, index in model["vocab"].items()}
    for added in spec["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]] = _Token(added["content"], kind)
    return tokens


def _not_supported(what: str, file: Path) -> UserError:
    fix = (
        "export safetensors; GGUF takes a vocab.txt, a byte-level BPE as that of GPT-2, and a SentencePiece model that "
        "is a unigram, or a BPE that leaves text as it is and has bytes for rare characters"
    )
    return UserError(ExitCode.USAGE, what, file.name, fix)


def _check_written(path: Path, state_dict: Mapping[str, np.ndarray], config: ModelConfig) -> None:
    import gguf

    written = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    wrong = sorted(written.keys() ^ {name for name, _ in _tensors(state_dict, config, copy=False)})
    for name, array in _tensors(state_dict, config):
        if name in written:
            found = written[name].view(ml_dtypes.bfloat16) if array.dtype == ml_dtypes.bfloat16 else written[name]
            if found.dtype != array.dtype or found.tobytes() != array.tobytes() or found.shape != array.shape:
                wrong.append(name)
    if wrong:
        fix = "check the disk, then run the same command again"
        raise UserError(ExitCode.IO, f"what was written differs from the model: {wrong[0]}", path, fix)
