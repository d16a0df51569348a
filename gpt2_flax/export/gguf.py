"""GGUF, the one file that llama.cpp and its relatives read: sizes, tokenizer and weights.

Matrices have the type of the export. Vectors and positions are float32, as llama.cpp wants them, with the same values:
the model is that of the safetensors file, number for number.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from sentencepiece import sentencepiece_model_pb2 as protobuf

from gpt2_flax.config import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.weight_files import Dtype
from gpt2_flax.text.spm import BLANK
from gpt2_flax.text.tokenizer import Tokenizer
from gpt2_flax.text.wordpiece import MASK, SPECIAL_TOKENS, read_vocabulary

GGUF = "model.gguf"

_FILE_TYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
_EMBEDDINGS = ("token_embd.weight", "position_embd.weight", "output.weight")  # the matrices that are not transposed


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
        fix = "run: pip install 'gpt2_flax[gguf]', or export another format"
        raise UserError(ExitCode.USAGE, "GGUF needs gguf, which is not installed", where, fix) from None
    return gguf


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
        tokens.setdefault(index, (f"[PAD{index}]", gguf.TokenType.UNUSED))
    ordered = [tokens[index] for index in range(vocab_size)]
    writer.add_token_list([token for token, _ in ordered])
    writer.add_token_types([int(token_type) for _, token_type in ordered])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.unk_id is not None:
        writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_pad_token_id(tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)  # the end of a document is no part of a prompt


def _wordpiece(gguf: ModuleType, writer: Any, file: Path) -> dict[int, tuple[str, int]]:
    """llama.cpp marks the begin of a word instead of what goes on in it."""
    ids = read_vocabulary(file.read_bytes(), file)
    special = {*SPECIAL_TOKENS.values(), MASK} & ids.keys()
    tokens = {}
    for token, index in ids.items():
        if token in special:
            tokens[index] = (token, gguf.TokenType.CONTROL)
        elif token.startswith("##") and len(token) > 2:
            tokens[index] = (token[2:], gguf.TokenType.NORMAL)
        else:
            tokens[index] = (BLANK + token, gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(1)
    writer.add_sep_token_id(ids[SPECIAL_TOKENS["sep_token"]])
    writer.add_add_sep_token(False)
    if MASK in ids:
        writer.add_mask_token_id(ids[MASK])
    return tokens


def _sentencepiece(gguf: ModuleType, writer: Any, file: Path) -> dict[int, tuple[str, int]]:
    proto = protobuf.ModelProto.FromString(file.read_bytes())
    unigram = proto.trainer_spec.model_type == protobuf.TrainerSpec.UNIGRAM
    writer.add_tokenizer_model("t5" if unigram else "llama")
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)
    if proto.normalizer_spec.precompiled_charsmap:
        writer.add_precompiled_charsmap(proto.normalizer_spec.precompiled_charsmap)
    # Both number their types alike: normal, unknown, control, user-defined, unused, byte.
    return {index: (piece.piece, piece.type) for index, piece in enumerate(proto.pieces)}


def _byte_level(gguf: ModuleType, writer: Any, file: Path) -> dict[int, tuple[str, int]]:
    spec = json.loads(file.read_bytes())
    model = spec["model"]
    if model["type"] != "BPE" or (spec["pre_tokenizer"] or {}).get("type") != "ByteLevel":
        fix = "export safetensors; GGUF takes a vocab.txt, a SentencePiece model or the byte-level BPE of GPT-2"
        raise UserError(ExitCode.USAGE, "GGUF has no tokenizer of this kind", file.name, fix)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_token_merges(merges)
    tokens = {index: (token, gguf.TokenType.NORMAL) for token, index in model["vocab"].items()}
    for added in spec["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    return tokens


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
