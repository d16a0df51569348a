"""A block of GPT-2: attention and MLP, each behind a layer norm and added to the residual stream.

A layer norm is an argument of the half that reads it, because the half's first product computes both, see `Linear`.

Dimension key: B batch, T sequence, N = B * T tokens, D n_embd, H heads, K head size, F inner width.
"""

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.model.attention import Kernel, causal_attention
from gpt2_flax.model.dropout import dropout, split_key
from gpt2_flax.model.layers import LayerNorm, Linear, gelu
from gpt2_flax.parallel.rules import constrain_BTD


class Attention(nnx.Module):
    """Multi-head causal self-attention."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.c_attn = Linear(cfg, (cfg.n_embd,), (3, cfg.n_head, cfg.head_size), rngs=rngs)
        self.c_proj = Linear(cfg, (cfg.n_head, cfg.head_size), (cfg.n_embd,), residual=True, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        norm: LayerNorm,
        kernel: Kernel,
        segments_BT: jax.Array | None,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        qkv_BT3HK = self.c_attn(x_BTD, norm)
        out_BTHK = causal_attention(kernel, qkv_BT3HK, segments_BT, self.cfg.attn_pdrop, dropout_key)
        return self.c_proj(out_BTHK)


class Mlp(nnx.Module):
    """Two dense layers around a tanh-approximated GELU (`gelu_new` in transformers)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.c_fc = Linear(cfg, (cfg.n_embd,), (4 * cfg.n_embd,), rngs=rngs)
        self.c_proj = Linear(cfg, (4 * cfg.n_embd,), (cfg.n_embd,), residual=True, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, norm: LayerNorm) -> jax.Array:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        inner_NF = checkpoint_name(self.c_fc(x_ND, norm), "mlp")
        return self.c_proj(gelu(inner_NF)).reshape(x_BTD.shape)


class Block(nnx.Module):
    """Pre-norm residual block."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.ln_1 = LayerNorm(cfg, rngs=rngs)
        self.attn = Attention(cfg, rngs=rngs)
        self.ln_2 = LayerNorm(cfg, rngs=rngs)
        self.mlp = Mlp(cfg, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, kernel: Kernel, segments_BT: jax.Array | None, dropout_key: jax.Array | None
    ) -> jax.Array:
        weights_key, attn_key, mlp_key = split_key(dropout_key, 3)
        attn_BTD = self.attn(x_BTD, self.ln_1, kernel, segments_BT, weights_key)
        x_BTD += dropout(attn_BTD, self.cfg.resid_pdrop, attn_key)
        x_BTD += dropout(self.mlp(x_BTD, self.ln_2), self.cfg.resid_pdrop, mlp_key)
        return constrain_BTD(x_BTD)
