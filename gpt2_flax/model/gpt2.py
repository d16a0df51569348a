"""GPT-2 (Radford et al., 2019) as a Flax NNX module that is also a plain JAX pytree.

Blocks are stacked: every parameter under `h` has a leading layer axis, so a block is compiled once and the tree has
16 arrays at any depth. Nothing is assigned outside `__init__`; the gradient of a `GPT2` is a `GPT2`.

Dimension key: B batch, T sequence, D n_embd, H heads, K head size, V vocabulary, L layers, S columns
of the cache, R parts that the rows of a batch are in.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_flax.config import ModelConfig
from gpt2_flax.data.packing import Batch
from gpt2_flax.model.attention import attention, causal_attention, choose, dropout, keep_attention
from gpt2_flax.model.block import Block, layer_norm, normed, split_key
from gpt2_flax.model.embedding import copies, look_up
from gpt2_flax.model.loss import LossSums, cross_entropy, logits
from gpt2_flax.parallel.mesh import platform
from gpt2_flax.parallel.rules import constrain_BTD

_REMAT_POLICIES = {
    "selected": jax.checkpoint_policies.save_from_both_policies(
        keep_attention, jax.checkpoint_policies.save_only_these_names("mlp")
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Cache(NamedTuple):
    """Keys and values of the columns seen so far, for generation; column `length` is written next.

    An array for each layer: of a stacked one, a step would copy the part that it reads.
    """

    k_BHSK: tuple[jax.Array, ...]
    v_BHSK: tuple[jax.Array, ...]
    length: jax.Array

    @classmethod
    def empty(cls, cfg: ModelConfig, batch_size: int, length: int) -> "Cache":
        shape = (batch_size, cfg.n_head, length, cfg.head_size)
        k_BHSK, v_BHSK = (tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.n_layer)) for _ in "kv")
        return cls(k_BHSK, v_BHSK, jnp.zeros((), jnp.int32))


class GPT2(nnx.Module):
    """Decoder-only language model whose head is its token embedding."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        embed = partial(nnx.Embed, dtype=jnp.dtype(cfg.dtype), rngs=rngs)
        normal = nnx.initializers.normal(cfg.initializer_range)
        self.wte = embed(cfg.padded_vocab_size, cfg.n_embd, embedding_init=_zero_rows_from(cfg.vocab_size, normal))
        self.wpe = embed(cfg.n_positions, cfg.n_embd, embedding_init=normal)
        self.h = jax.vmap(lambda key: Block(cfg, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), cfg.n_layer))
        self.ln_f = layer_norm(cfg, rngs)

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns float32 logits_BTV over `vocab_size` tokens; arguments as `hidden`."""
        x_BTD = self.hidden(tokens_BT, segments_BT, positions_BT, dropout_key)
        return logits(x_BTD, self.wte.embedding[...], self.cfg.vocab_size)[..., : self.cfg.vocab_size]

    def loss(self, batch: Batch, dropout_key: jax.Array | None = None) -> LossSums:
        """Returns the summed next-token loss of a batch; under a mesh its rows must be as `batch_sharding` says."""
        embedding_RVD = copies(self.wte.embedding[...])  # gathered, and its gradient reduced, once for both uses
        x_BTD = self.hidden(batch.tokens_BT, batch.segments_BT, batch.positions_BT, dropout_key, embedding_RVD)
        return cross_entropy(x_BTD, embedding_RVD, batch.targets_BT, self.cfg.vocab_size)

    def hidden(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        embedding_RVD: jax.Array | None = None,
    ) -> jax.Array:
        """Returns what the head sees, x_BTD in the compute dtype.

        tokens_BT: int32 ids. segments_BT: attention stays inside runs of one number (default: one segment a row),
        unless the model attends across documents; padding must come last in a row.
        positions_BT: default 0..T-1. Passing a `dropout_key` is what turns dropout on.
        embedding_RVD: `copies` of the token embedding, if they are there already.
        """
        if self.cfg.attend_across_documents:
            segments_BT = None  # all that they tell apart then is padding, which comes last, so that nothing sees it
        dropping, documents = dropout_key is not None, segments_BT is not None
        kernel, _ = choose(self.cfg, tokens_BT.shape[1], dropout=dropping, documents=documents, platform=platform())

        def attend(q_BTHK, k_BTHK, v_BTHK, key):
            return causal_attention(kernel, q_BTHK, k_BTHK, v_BTHK, segments_BT, self.cfg.attn_pdrop, key), None

        embed_key, layers_key = split_key(dropout_key, 2)
        x_BTD = self._embed(tokens_BT, positions_BT, embed_key, embedding_RVD)
        return self._blocks(x_BTD, attend, layers_key)

    def decode(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        first_column_B: jax.Array,
        cache: Cache,
        blocks: Sequence[Callable] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Returns float32 logits_BV after the last of `tokens_BT`, and the cache with these T columns added.

        Rows are padded on the left: the columns of the cache before `first_column_B` are never looked at.
        blocks: `self.blocks()`, or what computes the same; who calls this more than once should keep them.
        """
        columns_S = jnp.arange(cache.k_BHSK[0].shape[2])
        query_columns_T = cache.length + jnp.arange(tokens_BT.shape[1])
        mask_BTS = (columns_S <= query_columns_T[:, None]) & (columns_S >= first_column_B[:, None, None])
        # A padding column sees itself: a softmax over nothing is not a number.
        mask_BTS |= columns_S == query_columns_T[:, None]

        def attend(old_k_BHSK, old_v_BHSK, q_BTHK, k_BTHK, v_BTHK, _):
            start = (0, 0, cache.length, 0)
            k_BHSK, v_BHSK = (
                jax.lax.dynamic_update_slice(old_BHSK, new_BTHK.swapaxes(1, 2), start)
                for old_BHSK, new_BTHK in ((old_k_BHSK, k_BTHK), (old_v_BHSK, v_BTHK))
            )
            return attention(q_BTHK, k_BHSK, v_BHSK, mask_BTS), (k_BHSK, v_BHSK)

        x_BTD, kept = self._embed(tokens_BT, positions_BT, None), []
        for block, *layer_cache in zip(blocks or self.blocks(), cache.k_BHSK, cache.v_BHSK, strict=True):
            x_BTD, keys_and_values = block(x_BTD, partial(attend, *layer_cache), None)
            kept.append(keys_and_values)
        x_BTD = normed(self.ln_f, x_BTD[:, -1:])
        logits_BV = logits(x_BTD, self.wte.embedding[...], self.cfg.vocab_size)[:, 0, : self.cfg.vocab_size]
        return logits_BV, Cache(*zip(*kept, strict=True), cache.length + tokens_BT.shape[1])

    def blocks(self) -> tuple[Block, ...]:
        """Returns the layers one by one, with arrays of their own."""
        return tuple(jax.tree.map(itemgetter(layer), self.h) for layer in range(self.cfg.n_layer))

    def _embed(self, tokens_BT, positions_BT, key, embedding_RVD=None) -> jax.Array:
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        looked_up = self.wte(tokens_BT) if embedding_RVD is None else look_up(embedding_RVD, tokens_BT, self.cfg.dtype)
        x_BTD = looked_up + self.wpe(positions_BT)
        return constrain_BTD(dropout(x_BTD, self.cfg.embd_pdrop, key))

    def _blocks(self, x_BTD, attend, key) -> jax.Array:
        """Runs blocks and last norm."""

        def layer(x_BTD, block_and_key):
            block, key = block_and_key
            return block(x_BTD, attend, key)

        # Unrolled is faster on a CPU; elsewhere compile time and memory decide.
        unrolled = self.cfg.layers == "unrolled" or (self.cfg.layers == "auto" and platform() == "cpu")
        if self.cfg.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[self.cfg.remat], prevent_cse=unrolled)
        keys = None if key is None else jax.random.split(key, self.cfg.n_layer)
        x_BTD, _ = jax.lax.scan(layer, x_BTD, (self.h, keys), unroll=unrolled)
        return normed(self.ln_f, x_BTD)


def _zero_rows_from(row: int, init: nnx.Initializer) -> nnx.Initializer:
    """Draws the rows before `row`, so that padding does not change what is drawn, and leaves the others zero."""

    def padded(key, shape, dtype=jnp.float32, **kwargs):
        return jnp.zeros(shape, dtype).at[:row].set(init(key, (row, *shape[1:]), dtype, **kwargs))

    return padded
