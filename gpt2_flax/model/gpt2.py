"""GPT-2 (Radford et al., 2019) as a Flax NNX module that is also a plain JAX pytree.

Blocks are stacked: every parameter under `h` has a leading layer axis. A block is therefore compiled once, and the tree
has 16 arrays at any depth, or 17 if the head is not the token embedding. Nothing is assigned outside `__init__`, so
the gradient of a `GPT2` is a `GPT2`.

Dimension key: B batch, T sequence, D n_embd, N n_positions, V vocabulary, R replicas (see `model.embedding`).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data.packing import Batch
from gpt2_flax.model.attention import saves_attention
from gpt2_flax.model.attention_choice import choose_attention
from gpt2_flax.model.block import Block
from gpt2_flax.model.dropout import dropout, split_key
from gpt2_flax.model.embedding import embed_positions, embed_tokens, replicate
from gpt2_flax.model.layers import LayerNorm
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
        normal = nnx.initializers.normal(cfg.initializer_range)
        # Float32: in the compute dtype, the gradient of a row that many tokens share would be summed in bfloat16.
        embed = partial(nnx.Embed, features=cfg.n_embd, dtype=jnp.float32, rngs=rngs)
        by_token = partial(embed, cfg.padded_vocab_size, embedding_init=_zero_rows_from(cfg.vocab_size, normal))
        self.wte = by_token()
        self.wpe = embed(cfg.n_positions, embedding_init=normal)
        self.h = jax.vmap(lambda key: Block(cfg, rngs=nnx.Rngs(key)))(jax.random.split(rngs.params(), cfg.n_layer))
        self.ln_f = LayerNorm(cfg, rngs=rngs)
        if not cfg.tie_word_embeddings:  # sampled last, so that all other parameters are as in a tied model
            self.lm_head = by_token()

    @property
    def head_VD(self) -> jax.Array:
        """The matrix that turns hidden states into logits, float32."""
        return (self.wte if self.cfg.tie_word_embeddings else self.lm_head).embedding[...]

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Return float32 logits_BTV over `vocab_size` tokens; arguments as in `hidden`."""
        x_BTD = self.hidden(tokens_BT, segments_BT, positions_BT, dropout_key)
        return logits(x_BTD, self.head_VD, self.cfg.vocab_size)[..., : self.cfg.vocab_size]

    def loss(self, batch: Batch, dropout_key: jax.Array | None = None) -> LossSums:
        """Return the summed next-token loss of a batch; under a mesh its rows must lie as `batch_sharding` says."""
        tokens_BT, targets_BT, segments_BT, positions_BT = map(jnp.asarray, batch)
        embedding_RVD = replicate(self.wte.embedding[...])  # gathered, and its gradient reduced, once for both uses
        head_RVD = embedding_RVD if self.cfg.tie_word_embeddings else replicate(self.head_VD)
        x_BTD = self.hidden(tokens_BT, segments_BT, positions_BT, dropout_key, embedding_RVD)
        return cross_entropy(x_BTD, head_RVD, targets_BT, self.cfg.vocab_size)

    def hidden(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        embedding_RVD: jax.Array | None = None,
    ) -> jax.Array:
        """Return the input of the head, x_BTD in the compute dtype.

        Args:
            tokens_BT: int32 token ids.
            segments_BT: Attention stays inside runs of one number, unless the model attends across documents. Padding
                must come last in a row. None: each row is one segment.
            positions_BT: int32 positions. None: 0 to T - 1 in each row.
            dropout_key: None turns dropout off.
            embedding_RVD: The token embedding as `replicate` returns it, if the caller has it.
        """
        if self.cfg.attend_across_documents:
            segments_BT = None  # the rest of their use is to mark padding, which comes last, so that no token sees it
        kernel, _ = choose_attention(
            self.cfg,
            tokens_BT.shape[1],
            dropout=dropout_key is not None,
            documents=segments_BT is not None,
            platform=platform(),
        )
        embed_key, layers_key = split_key(dropout_key, 2)
        x_BTD = self._embed(tokens_BT, positions_BT, embedding_RVD)
        x_BTD = constrain_BTD(dropout(x_BTD, self.cfg.embd_pdrop, embed_key))

        def layer(x_BTD, block_and_key):
            block, key = block_and_key
            return block(x_BTD, kernel, segments_BT, key), None

        unrolled, _ = unroll_layers(self.cfg, platform())
        if self.cfg.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[self.cfg.remat], prevent_cse=unrolled)
        keys = None if layers_key is None else jax.random.split(layers_key, self.cfg.n_layer)
        x_BTD, _ = jax.lax.scan(layer, x_BTD, (self.h, keys), unroll=unrolled)
        return self.ln_f(x_BTD)

    def _embed(
        self, tokens_BT: jax.Array, positions_BT: jax.Array | None, embedding_RVD: jax.Array | None
    ) -> jax.Array:
        """Return the sum of token and position embeddings, x_BTD in the compute dtype."""
        if embedding_RVD is None:
            by_token_BTD = self.wte(tokens_BT)
        else:
            by_token_BTD = embed_tokens(embedding_RVD, tokens_BT, self.cfg.dtype)
        wpe_ND = self.wpe.embedding[...]
        by_position = wpe_ND[: tokens_BT.shape[1]] if positions_BT is None else embed_positions(wpe_ND, positions_BT)
        return (by_token_BTD + by_position).astype(self.cfg.dtype)


def unroll_layers(cfg: ModelConfig, platform: str) -> tuple[bool, str]:
    """Return whether the program repeats each layer instead of looping over them, and the reason, for display.

    A loop copies the arrays that each layer saves for the backward pass into arrays of all layers, and out again: with
    124M parameters and 32 x 1,024 tokens, 48 of 136 GB of memory traffic on an H200. A loop compiles in half the time
    or less, which matters more the deeper the model is.
    """
    if cfg.layers != "auto":
        return cfg.layers == "unrolled", "set by model.layers"
    if platform == "cpu":
        return True, "faster on a cpu"
    if platform == "gpu" and cfg.n_layer <= _FEW_LAYERS:
        return True, f"up to {_FEW_LAYERS} layers are faster so on a gpu"
    return False, "compiled once for all"


def _zero_rows_from(row: int, init: nnx.Initializer) -> nnx.Initializer:
    """Return an initializer that samples the rows before `row`, whatever the padding is, and leaves the others zero."""

    def padded(key, shape, dtype=jnp.float32, **kwargs):
        return jnp.zeros(shape, dtype).at[:row].set(init(key, (row, *shape[1:]), dtype, **kwargs))

    return padded
