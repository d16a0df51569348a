"""nanoGPT's own arithmetic, to compare an imported checkpoint with.

Dimension key: B batch, T time, V vocabulary, D n_embd, H heads, K head size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_flax.checkpoint.nanogpt import nanogpt_tensors, open_nanogpt
from gpt2_flax.checkpoint.source import Source
from gpt2_flax.checkpoint.tensor_files import Tensor
from gpt2_flax.checkpoint.weights import logits_of


class Comparison(NamedTuple):
    """How our logits and nanoGPT's differ at most, over how many tokens."""

    by_tanh: float
    exact: float
    max_logit: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens, up to {self.max_logit:.3g}, equal nanoGPT's within {self.by_tanh:.1e} if "
            f"it was trained with GELU by tanh as here, within {self.exact:.1e} if with nn.GELU() as newer versions do"
        )


def compare_with_nanogpt(path: Path, source: Source) -> Comparison:
    """Return how the model in `source` compares with the `ckpt.pt` at `path`, computed as nanoGPT does in float32."""
    tensors, config = nanogpt_tensors(open_nanogpt(path) or {}, path), source.model
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, min(64, config.n_positions)))
    ours_BTV = logits_of(source.weights, config, tokens_BT)
    by_tanh, exact = (
        float(np.abs(ours_BTV - _logits(tensors, config.n_layer, config.n_head, tokens_BT, gelu)).max())
        for gelu in ("tanh", "none")
    )
    return Comparison(by_tanh, exact, float(np.abs(ours_BTV).max()), tokens_BT.size)


def _logits(tensors: Mapping[str, Tensor], n_layer: int, n_head: int, tokens_BT: np.ndarray, gelu: str) -> np.ndarray:
    """Returns float32 logits (B, T, V) from tensors under nanoGPT's names; `gelu` is torch's name of the way."""
    import torch
    from torch.nn import functional

    def load(name: str) -> torch.Tensor | None:  # without bias there is none
        return torch.from_numpy(tensors[name].load()) if name in tensors else None

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, load(f"{name}.weight"), load(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], load(f"{name}.weight"), load(f"{name}.bias"), 1e-5)

    words_VD, length = load("transformer.wte.weight"), tokens_BT.shape[1]
    x_BTD = words_VD[torch.from_numpy(tokens_BT)] + load("transformer.wpe.weight")[:length]
    for layer in range(n_layer):
        block = f"transformer.h.{layer}"
        qkv = linear(norm(x_BTD, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1)
        q_BHTK, k_BHTK, v_BHTK = (part.unflatten(-1, (n_head, -1)).transpose(1, 2) for part in qkv)
        mixed_BHTK = functional.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTD = x_BTD + linear(mixed_BHTK.transpose(1, 2).flatten(2), f"{block}.attn.c_proj")
        inner = functional.gelu(linear(norm(x_BTD, f"{block}.ln_2"), f"{block}.mlp.c_fc"), approximate=gelu)
        x_BTD = x_BTD + linear(inner, f"{block}.mlp.c_proj")
    head_VD = load("lm_head.weight")
    return functional.linear(norm(x_BTD, "transformer.ln_f"), words_VD if head_VD is None else head_VD).numpy()
