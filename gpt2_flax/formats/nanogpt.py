"""Read checkpoints of nanoGPT: `ckpt.pt`, a dict with the state dict `model` and the sizes `model_args`.

The tensors have the names of `transformers`, but matrices are torch Linears, [out, in]. A model without `bias` has no
biases, which computes the same as biases of zero. New versions of nanoGPT compute GELU exactly, old versions by tanh
like this package; the file does not say which.

Dimension key: B batch, T time, V vocabulary, D n_embd, H heads, K head size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_flax.checkpoint.huggingface import HEAD, assemble, expected_shapes, from_hf_config
from gpt2_flax.checkpoint.tensor_files import Tensor, read_torch, torch_tensors, unwrapped
from gpt2_flax.checkpoint.weights import logits_of
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError, quote

_LINEAR = (".attn.c_attn.weight", ".attn.c_proj.weight", ".mlp.c_fc.weight", ".mlp.c_proj.weight")
_WORDS = "transformer.wte.weight"
_SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_positions": "block_size"}
_FIX = "it should be the ckpt.pt that train.py of nanoGPT wrote; copy it again"


class Comparison(NamedTuple):
    """The largest difference between two logits, for both kinds of GELU."""

    by_tanh: float
    exact: float
    max_logit: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens, up to {self.max_logit:.3g}, equal nanoGPT's within {self.by_tanh:.1e} if "
            f"it was trained with GELU by tanh as here, within {self.exact:.1e} if with nn.GELU() as newer versions do"
        )


def read_content(
    content: Mapping[str, Any], path: Path, config_file: None = None
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return the config and float32 weights of an opened `ckpt.pt`; prefixes of wrappers are removed.

    The head is tied if it holds the same numbers as the token embedding.

    Raises:
        UserError: DATA that names a field or tensor that is malformed, missing, surplus or not finite.
    """
    arguments, tensors = content["model_args"], _tensors(content, path)
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
    if tied:  # loading the same numbers again would cost memory
        fitting.pop(HEAD.name, None)
    return config, assemble(fitting, config, path)


def compare(path: Path, weights: Mapping[str, np.ndarray], config: ModelConfig) -> Comparison:
    """Return how the logits of a model differ from the `ckpt.pt` at `path`, computed like nanoGPT in float32."""
    tensors = _tensors(read_torch(path, _FIX), path)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, min(64, config.n_positions)))
    ours_BTV = logits_of(dict(weights), config, tokens_BT)
    by_tanh, exact = (
        float(np.abs(ours_BTV - _logits(tensors, config.n_layer, config.n_head, tokens_BT, gelu)).max())
        for gelu in ("tanh", "none")
    )
    return Comparison(by_tanh, exact, float(np.abs(ours_BTV).max()), tokens_BT.size)


def _tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    return unwrapped(torch_tensors(content["model"], path, _FIX))


def _transposed(tensor: Tensor) -> Tensor:
    return Tensor(tensor.shape[::-1], tensor.dtype, lambda: tensor.load().T)


def _logits(tensors: Mapping[str, Tensor], n_layer: int, n_head: int, tokens_BT: np.ndarray, gelu: str) -> np.ndarray:
    """Return float32 logits (B, T, V); `gelu` is "tanh" or "none", as torch names the approximation."""
    import torch
    from torch.nn import functional

    def load(name: str) -> torch.Tensor:
        return torch.from_numpy(tensors[name].load())

    def bias(name: str) -> torch.Tensor | None:
        return load(f"{name}.bias") if f"{name}.bias" in tensors else None

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, load(f"{name}.weight"), bias(name))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], load(f"{name}.weight"), bias(name), 1e-5)

    words_VD, length = load(_WORDS), tokens_BT.shape[1]
    x_BTD = words_VD[torch.from_numpy(tokens_BT)] + load("transformer.wpe.weight")[:length]
    for layer in range(n_layer):
        block = f"transformer.h.{layer}"
        qkv_3BTD = linear(norm(x_BTD, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1)
        q_BHTK, k_BHTK, v_BHTK = (one_BTD.unflatten(-1, (n_head, -1)).transpose(1, 2) for one_BTD in qkv_3BTD)
        mixed_BHTK = functional.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTD = x_BTD + linear(mixed_BHTK.transpose(1, 2).flatten(2), f"{block}.attn.c_proj")
        inner = functional.gelu(linear(norm(x_BTD, f"{block}.ln_2"), f"{block}.mlp.c_fc"), approximate=gelu)
        x_BTD = x_BTD + linear(inner, f"{block}.mlp.c_proj")
    head_VD = load("lm_head.weight") if "lm_head.weight" in tensors else words_VD
    return functional.linear(norm(x_BTD, "transformer.ln_f"), head_VD).numpy()
