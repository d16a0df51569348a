"""Checkpoints of nanoGPT: `ckpt.pt`, a dict with the state dict `model` and the sizes `model_args`.

Names are the names of `transformers`, but matrices are torch Linears, [out, in]. Without `bias` there are no biases,
which is what biases of zero compute. Newer versions of nanoGPT compute GELU exactly, older ones by tanh as we do; the
file does not say which.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_flax.checkpoint.huggingface import HEAD, assemble, expected_shapes, from_hf_config
from gpt2_flax.checkpoint.tensor_files import Tensor, read_torch, torch_tensors, unwrapped
from gpt2_flax.config import ModelConfig
from gpt2_flax.errors import ExitCode, UserError, quote

_LINEAR = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")
_WORDS = "transformer.wte.weight"
_SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_positions": "block_size"}
_FIX = "it should be the ckpt.pt that train.py of nanoGPT wrote; copy it again"


def open_nanogpt(path: Path) -> dict[str, Any] | None:
    """Return what a `ckpt.pt` holds, None if the file is of another program. Raises `UserError` as `read_torch`."""
    if path.suffix == ".safetensors":
        return None
    checkpoint = read_torch(path, _FIX)
    return checkpoint if {"model", "model_args"} <= checkpoint.keys() else None


def from_nanogpt(checkpoint: Mapping[str, Any], path: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return the config and float32 weights of an opened `ckpt.pt`; the prefixes of wrappers are left out.

    The head is the token embedding if it holds the same numbers.
    Raises `UserError` (DATA) naming a field or tensor that is malformed, missing, surplus or not finite.
    """
    arguments, tensors = checkpoint["model_args"], nanogpt_tensors(checkpoint, path)
    known = {*_SIZES.values(), "bias", "vocab_size", "dropout"}
    if not isinstance(arguments, dict) or not known >= arguments.keys() >= set(_SIZES.values()):
        surplus = quote(sorted(map(str, arguments.keys() ^ known)) if isinstance(arguments, dict) else arguments)
        raise UserError(ExitCode.DATA, f"model_args are not nanoGPT's ({surplus})", path, _FIX)
    if _WORDS not in tensors:
        raise UserError(ExitCode.DATA, f"{_WORDS} missing", path, _FIX)
    tied = HEAD.name not in tensors or np.array_equal(tensors[HEAD.name].load(), tensors[_WORDS].load(), equal_nan=True)
    values = {ours: arguments[theirs] for ours, theirs in _SIZES.items()}
    values |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), arguments.get("dropout", 0.0))
    values |= {"model_type": "gpt2", "vocab_size": tensors[_WORDS].shape[0], "tie_word_embeddings": tied}
    config = from_hf_config(values, path)
    fitting = {name: _transposed(tensor) if name.endswith(_LINEAR) else tensor for name, tensor in tensors.items()}
    if arguments.get("bias") is False:
        for name, shape in expected_shapes(config).items():
            if name.endswith(".bias"):
                zeros = Tensor(shape, "float32", lambda shape=shape: np.zeros(shape, np.float32))
                fitting.setdefault(f"transformer.{name}", zeros)
    if tied:  # as loaded once more it would cost memory
        fitting.pop(HEAD.name, None)
    return config, assemble(fitting, config, path)


def nanogpt_tensors(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of an opened `ckpt.pt` by their names in nanoGPT; raises `UserError` (DATA)."""
    return unwrapped(torch_tensors(checkpoint["model"], path, _FIX))


def _transposed(tensor: Tensor) -> Tensor:
    return Tensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.load().T)
