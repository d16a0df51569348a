"""UER-py's own arithmetic, to compare a model with, and folders that UER-py and TencentPretrain load.

model.bin         the state dict, for --pretrained_model_path
uer_config.json   for --config_path
vocab.txt         for --vocab_path

Dimension key: B batch, T time, V vocabulary, D n_embd.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.checkpoint.tensor_files import Tensor
from gpt2_flax.checkpoint.uer import HEAD, LAYER_NORM_EPSILON, open_uer, to_uer, to_uer_config
from gpt2_flax.checkpoint.weights import Weights, logits_of
from gpt2_flax.config import ModelConfig
from gpt2_flax.errors import ExitCode, UserError, missing_package
from gpt2_flax.folders import new_folder
from gpt2_flax.tokenizers.wordpiece import WordPieceTokenizer

UER_MODEL = "model.bin"
UER_CONFIG = "uer_config.json"


class Comparison(NamedTuple):
    """How our logits and UER-py's differ at most, over how many tokens."""

    max_logit_difference: float
    max_logit: float
    tokens: int
    epsilon: float

    def __str__(self) -> str:
        shown = f"logits of {self.tokens} tokens are those of UER-py within {self.max_logit_difference:.1e}"
        if self.epsilon != LAYER_NORM_EPSILON:
            shown += (
                f" (layer_norm_epsilon is {self.epsilon:g} here, where {LAYER_NORM_EPSILON:g} is nearest to UER-py)"
            )
        return shown


def compare_with_uer(path: Path, source: Source) -> Comparison:
    """Returns how the model in `source` compares with the UER-py file at `path`, computed as UER-py does.

    Raises `UserError` (DATA) when the file holds numbers that are not finite.
    """
    return _compare(open_uer(path), source.weights, source.model, path)


def write_uer(source: Source, output: Path, overwrite: bool = False) -> Comparison:
    """Writes a folder for UER-py, reads it back, and returns how its logits compare with the model's.

    Raises `UserError`: USAGE when torch is not installed, CANT_CREATE when `output` may not be written, DATA when the
    vocabulary is not one of BERT or not as long as the embedding, BUG when other numbers were read back.
    """
    try:
        import torch
    except ImportError:
        raise missing_package("--format uer", "torch", "export", output) from None
    tokenizer = source.tokenizer()
    if not isinstance(tokenizer, WordPieceTokenizer) or tokenizer.vocab_size != source.model.vocab_size:
        what = f"UER-py needs a BERT vocabulary of as many tokens as the model has rows, {source.model.vocab_size}"
        raise UserError(ExitCode.DATA, what, source.tokenizer_folder, "give it with --tokenizer vocab.txt")
    arrays = to_uer(source.weights, source.model)
    with new_folder(output, UER_CONFIG, overwrite) as folder:
        tensors = {id(array): torch.from_numpy(array) for array in arrays.values()}  # the tied one stored once
        torch.save({name: tensors[id(array)] for name, array in arrays.items()}, folder / UER_MODEL)
        (folder / UER_CONFIG).write_text(json.dumps(to_uer_config(source.model), indent=2) + "\n", encoding="utf-8")
        (folder / "vocab.txt").write_bytes(tokenizer.vocabulary)
        found = open_uer(folder / UER_MODEL)
        if found.keys() != arrays.keys() or any(not np.array_equal(found[n].load(), arrays[n]) for n in arrays):
            raise UserError(
                ExitCode.BUG, "other numbers were read back", output, "nothing was kept; please report this"
            )
        return _compare(found, source.weights, source.model, output)


def _compare(tensors: Mapping[str, Tensor], weights: Weights, config: ModelConfig, where: Path) -> Comparison:
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, min(64, config.n_positions)))
    ours_BTV = logits_of(weights, config, tokens_BT)
    difference = float(np.abs(ours_BTV - _uer_logits(tensors, config, tokens_BT)).max())
    if not math.isfinite(difference):
        raise UserError(ExitCode.DATA, "it computes numbers that are not finite", where, "use an earlier checkpoint")
    return Comparison(difference, float(np.abs(ours_BTV).max()), tokens_BT.size, config.layer_norm_epsilon)


def _uer_logits(tensors: Mapping[str, Tensor], config: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray:
    """Returns float32 logits (B, T, V) from tensors under UER-py's names, loaded a layer at a time."""

    def load(name: str) -> np.ndarray:
        return tensors[name].load().astype(np.float32, copy=False)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ load(f"{name}.weight").T + load(f"{name}.bias")

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        deviation = x.std(-1, ddof=1, keepdims=True)
        return load(f"{name}.gamma") * (x - x.mean(-1, keepdims=True)) / (deviation + 1e-6) + load(f"{name}.beta")

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        rows, length, width = x.shape
        q, k, v = (
            linear(x, f"{name}.linear_layers.{part}").reshape(rows, length, config.n_head, -1).swapaxes(1, 2)
            for part in range(3)
        )
        scores = q @ k.swapaxes(2, 3) / np.float32(math.sqrt(config.head_size))
        scores = np.where(np.tri(length, dtype=bool), scores, scores - np.float32(10_000))
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = shares / shares.sum(-1, keepdims=True) @ v
        return linear(mixed.swapaxes(1, 2).reshape(rows, length, width), f"{name}.final_linear")

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + 0.044715 * x**3)))

    words_VD = load("embedding.word.embedding.weight")
    x_BTD = words_VD[tokens_BT] + load("embedding.pos.embedding.weight")[: tokens_BT.shape[1]]
    for layer in range(config.n_layer):
        block = f"encoder.transformer.{layer}"
        x_BTD = x_BTD + attention(norm(x_BTD, f"{block}.layer_norm_1"), f"{block}.self_attn")
        inner = gelu(linear(norm(x_BTD, f"{block}.layer_norm_2"), f"{block}.feed_forward.linear_1"))
        x_BTD = x_BTD + linear(inner, f"{block}.feed_forward.linear_2")
    head_VD = words_VD if config.tie_word_embeddings else load(HEAD.name)
    return norm(x_BTD, "encoder.layer_norm") @ head_VD.T
