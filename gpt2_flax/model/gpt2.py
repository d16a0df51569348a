"""GPT-2 (Radford et al., 2019) as a Flax NNX module that is also a plain JAX pytree.

Blocks are stacked: every parameter under `h` has a leading layer axis, so a block is compiled once and the tree has
16 arrays at any depth, 17 if the head is not the token embedding. Nothing is assigned outside `__init__`; the gradient
of a `GPT2` is a `GPT2`.

Dimension key: B batch, T sequence, D n_embd, H heads, K head size, V vocabulary, L layers, R parts
that the rows of a batch are in.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_flax.config.schema import ModelConfig
from gpt2_flax.data.packing import Batch
from gpt2_flax.model.attention import causal_attention, saves_attention
from gpt2_flax.model.attention_choice import choose
from gpt2_flax.model.block import Block, make_norm, normed, split_key
from gpt2_flax.model.dropout import dropout
from gpt2_flax.model.embedding import copies, look_up, look_up_whole
from gpt2_flax.model.loss import LossSums, cross_entropy, logits
from gpt2_flax.parallel.mesh import platform
from gpt2_flax.parallel.rules import constrain_BTD

_FEW_LAYERS = 24

_REMAT_POLICIES = {
    "selected": jax.checkpoint_policies.save_from_both_policies(
        saves_attention, jax.checkpoint_policies.save_only_these_names("mlp")
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class GPT2(nnx.Module):
    """Decoder-only language model whose head is its token embedding, or `lm_head` if they are not tied."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        # Float32: in the compute dtype, the gradient of a row that many tokens share would be summed in bfloat16.
        embed = partial(nnx.Embed, dtype=jnp.float32, rngs=rngs)
        normal = nnx.initializers.normal(cfg.initializer_range)
        by_token = partial(embed, cfg.padded_vocab_size, embedding_init=_zero_rows_from(cfg.vocab_size, normal))
        self.wte = by_token(cfg.n_embd)
        self.wpe = embed(cfg.n_positions, cfg.n_embd, embedding_init=normal)
        self.h = jax.vmap(lambda key: Block(cfg, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), cfg.n_layer))
        self.ln_f = make_norm(cfg, rngs)
        if not cfg.tie_word_embeddings:  # drawn last, so that all else is as in a model that has none
            self.lm_head = by_token(cfg.n_embd)

    @property
    def head_VD(self) -> jax.Array:
        """What hidden states are multiplied with, float32."""
        return (self.wte if self.cfg.tie_word_embeddings else self.lm_head).embedding[...]

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns float32 logits_BTV over `vocab_size` tokens; arguments as `hidden`."""
        x_BTD = self.hidden(tokens_BT, segments_BT, positions_BT, dropout_key)
        return logits(x_BTD, self.head_VD, self.cfg.vocab_size)[..., : self.cfg.vocab_size]

    def loss(self, batch: Batch, dropout_key: jax.Array | None = None) -> LossSums:
        """Returns the summed next-token loss of a batch; under a mesh its rows must be as `batch_sharding` says."""
        embedding_RVD = copies(self.wte.embedding[...])  # gathered, and its gradient reduced, once for both uses
        head_RVD = embedding_RVD if self.cfg.tie_word_embeddings else copies(self.head_VD)
        x_BTD = self.hidden(batch.tokens_BT, batch.segments_BT, batch.positions_BT, dropout_key, embedding_RVD)
        return cross_entropy(x_BTD, head_RVD, batch.targets_BT, self.cfg.vocab_size)

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

        def attend(qkv_BT3HK, key):
            return causal_attention(kernel, qkv_BT3HK, segments_BT, self.cfg.attn_pdrop, key), None

        embed_key, layers_key = split_key(dropout_key, 2)
        x_BTD = self._embed(tokens_BT, positions_BT, embed_key, embedding_RVD)
        return self._blocks(x_BTD, attend, layers_key)

    def _embed(self, tokens_BT, positions_BT, key, embedding_RVD=None) -> jax.Array:
        looked_up = self.wte(tokens_BT) if embedding_RVD is None else look_up(embedding_RVD, tokens_BT, self.cfg.dtype)
        wpe_ND = self.wpe.embedding[...]
        by_position = wpe_ND[: tokens_BT.shape[1]] if positions_BT is None else look_up_whole(wpe_ND, positions_BT)
        x_BTD = (looked_up + by_position).astype(self.cfg.dtype)
        return constrain_BTD(dropout(x_BTD, self.cfg.embd_pdrop, key))

    def _blocks(self, x_BTD, attend, key) -> jax.Array:
        """Runs blocks and last norm."""

        def layer(x_BTD, block_and_key):
            block, key = block_and_key
            return block(x_BTD, attend, key)

        unrolled, _ = unroll_layers(self.cfg, platform())
        if self.cfg.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[self.cfg.remat], prevent_cse=unrolled)
        keys = None if key is None else jax.random.split(key, self.cfg.n_layer)
        x_BTD, _ = jax.lax.scan(layer, x_BTD, (self.h, keys), unroll=unrolled)
        return normed(self.ln_f, x_BTD)


def unroll_layers(cfg: ModelConfig, platform: str) -> tuple[bool, str]:
    """Returns whether layers stand in line in the program, instead of one in a loop, and why, to be shown.

    A loop over layers copies what each saves for the backward pass into arrays of all layers and out again: of 124M
    parameters at 32 x 1,024, 48 of 136 GB of memory traffic on an H200. It compiles in half of the time or
    less, and that matters more the deeper the model is.
    """
    if cfg.layers != "auto":
        return cfg.layers == "unrolled", "set by model.layers"
    if platform == "cpu":
        return True, "faster on a cpu"
    if platform == "gpu" and cfg.n_layer <= _FEW_LAYERS:
        return True, f"up to {_FEW_LAYERS} layers are faster so on a gpu"
    return False, "compiled once for all"


def _zero_rows_from(row: int, init: nnx.Initializer) -> nnx.Initializer:
    """Draws the rows before `row`, so that padding does not change what is drawn, and leaves the others zero."""

    def padded(key, shape, dtype=jnp.float32, **kwargs):
        return jnp.zeros(shape, dtype).at[:row].set(init(key, (row, *shape[1:]), dtype, **kwargs))

    return padded
