"""The choice of the next token: filters in the order of `transformers`, then the most likely token or a sample.

All settings are arguments of the compiled program, so that one program serves every setting; a filter that is off costs
nothing.
Dimension key: B rows, V vocabulary, S columns of prompt and new tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Setting = jax.Array | np.ndarray
"""A setting as an argument of a compiled program."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; filters apply in the order of `transformers`."""

    temperature: float = 1.0
    """0 chooses the most likely token (greedy)."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep only the most likely tokens that together have this probability (Holtzman et al., arXiv:1904.09751)."""
    min_p: float = 0.0
    """Keep only tokens at least this share as likely as the most likely token (Nguyen et al., arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the text already has become less likely (Keskar et al., arXiv:1909.05858)."""
    no_repeat_ngram: int = 0
    """No run of this many tokens occurs twice, prompt included; 0 allows all."""
    banned: tuple[int, ...] | None = None
    """Ids that are never chosen. None: no ids when generating ids; special tokens when generating text."""

    def arrays(self, vocab_size: int) -> "SamplingArrays":
        """Return the settings for a compiled program; ids in `banned` beyond the vocabulary are ignored."""
        banned_V = np.zeros(vocab_size, bool)
        banned_V[[token for token in self.banned or () if 0 <= token < vocab_size]] = True
        return SamplingArrays(
            np.array(self.temperature, np.float32),
            np.array(self.top_p, np.float32),
            np.array(self.min_p, np.float32),
            np.array(self.repetition_penalty, np.float32),
            np.array(min(self.top_k, vocab_size), np.int32),
            np.array(self.no_repeat_ngram, np.int32),
            banned_V,
        )


class SamplingArrays(NamedTuple):
    """`Sampling` as arrays."""

    temperature: Setting
    top_p: Setting
    min_p: Setting
    repetition_penalty: Setting
    top_k: Setting
    no_repeat_ngram: Setting
    banned_V: Setting


class History(NamedTuple):
    """The tokens so far: the first `length_B` tokens of each row of tokens_BS."""

    tokens_BS: jax.Array
    length_B: jax.Array
    seen_BV: jax.Array
    """Which ids of the vocabulary are among the tokens so far, bool."""

    def added(self, tokens_B: jax.Array, to_B: jax.Array) -> "History":
        """Return the history with one more token in the rows where `to_B` is true."""
        rows_B = jnp.arange(len(tokens_B))
        tokens_BS = self.tokens_BS.at[rows_B, self.length_B].set(
            jnp.where(to_B, tokens_B, self.tokens_BS[rows_B, self.length_B])
        )
        return History(tokens_BS, self.length_B + to_B, self.seen_BV.at[rows_B, tokens_B].max(to_B))


def next_tokens(
    logits_BV: jax.Array, history: History, sampling: SamplingArrays, keys_B: jax.Array, eos_id: jax.Array | int
) -> jax.Array:
    """Return the next token of each row, int32 (B,): `eos_id` where every token is ruled out.

    A row's sample depends on its key alone, not on the other rows.
    """
    logits_BV = allowed_logits(logits_BV, history, sampling)

    def with_noise():  # the highest logit after adding Gumbel noise is a sample from the softmax of the logits
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        return likely_logits(logits_BV, sampling) + noise_BV

    scores_BV = jax.lax.cond(sampling.temperature == 0.0, lambda: logits_BV, with_noise)
    highest_B1 = scores_BV.max(-1, keepdims=True)
    # The first of the highest scores, in two vectorised passes; XLA's argmax takes a CPU 20 times as long.
    ids_V = jnp.arange(scores_BV.shape[1], dtype=jnp.int32)
    chosen_B = jnp.where(scores_BV == highest_B1, ids_V, scores_BV.shape[1] - 1).min(-1)
    return jnp.where(highest_B1[:, 0] > -jnp.inf, chosen_B, eos_id)


def allowed_logits(logits_BV: jax.Array, history: History, sampling: SamplingArrays) -> jax.Array:
    """Return the logits after the filters of greedy choice: repetition penalty, n-grams and banned tokens (-inf)."""
    penalty = sampling.repetition_penalty

    def punished():
        punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        return jnp.where(history.seen_BV, punished_BV, logits_BV)

    logits_BV = jax.lax.cond(penalty == 1.0, lambda: logits_BV, punished)
    n = sampling.no_repeat_ngram
    logits_BV = jax.lax.cond(n == 0, lambda: logits_BV, lambda: _without_repeated_ngrams(logits_BV, history, n))
    return jnp.where(sampling.banned_V, -jnp.inf, logits_BV)


def likely_logits(logits_BV: jax.Array, sampling: SamplingArrays) -> jax.Array:
    """Return the logits of the distribution to sample: divided by the temperature, -inf for unlikely tokens.

    A row keeps at least one token if it had one. Equal logits are kept or filtered together.
    """
    logits_BV = logits_BV / jnp.maximum(sampling.temperature, 1e-6)  # 0 is greedy, and lower numbers would overflow
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p

    def only_top_k():
        return _highest(logits_BV, jnp.ones_like(logits_BV), top_k.astype(jnp.float32))

    is_all = (top_k == 0) | (top_k >= logits_BV.shape[-1])
    logits_BV = jax.lax.cond(is_all, lambda: logits_BV, only_top_k)

    def only_top_p():
        return _highest(logits_BV, jax.nn.softmax(logits_BV), top_p)

    logits_BV = jax.lax.cond(top_p >= 1.0, lambda: logits_BV, only_top_p)

    def only_min_p():
        probability_BV = jax.nn.softmax(logits_BV)
        least_B1 = min_p * probability_BV.max(-1, keepdims=True)
        return jnp.where(probability_BV < least_B1, -jnp.inf, logits_BV)

    return jax.lax.cond(min_p == 0.0, lambda: logits_BV, only_min_p)


def _highest(logits_BV: jax.Array, weights_BV: jax.Array, needed: Setting) -> jax.Array:
    """Keep the fewest highest logits whose weights sum to `needed`, at least one, and set the others to -inf.

    The threshold is found bit by bit, which is faster than sorting a vocabulary.
    """
    one_zero_BV = jnp.where(logits_BV == 0, 0.0, logits_BV)  # negative zero has other bits
    bits_BV = jax.lax.bitcast_convert_type(one_zero_BV, jnp.uint32)
    sign = jnp.uint32(2**31)
    order_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)  # unsigned numbers in the order of the floats

    def with_bit(step, least_B1):
        higher_B1 = least_B1 | (sign >> step.astype(jnp.uint32))
        weight_B1 = jnp.where(order_BV >= higher_B1, weights_BV, 0).sum(-1, keepdims=True)
        return jnp.where(weight_B1 >= needed, higher_B1, least_B1)

    least_B1 = jax.lax.fori_loop(0, 32, with_bit, jnp.zeros_like(order_BV[:, :1]))
    least_B1 = jnp.minimum(least_B1, order_BV.max(-1, keepdims=True))
    return jnp.where(order_BV < least_B1, -jnp.inf, logits_BV)


def _without_repeated_ngrams(logits_BV: jax.Array, history: History, n: Setting) -> jax.Array:
    """Rule out the tokens that would complete a run of `n` tokens that the text already has."""
    tokens_BS, length_B1 = history.tokens_BS, history.length_B[:, None]
    columns_S = jnp.arange(tokens_BS.shape[1])

    def same(offset, matches_BS):
        last_B1 = jnp.take_along_axis(tokens_BS, length_B1 - n + 1 + offset, axis=1, mode="clip")
        return matches_BS & (jnp.roll(tokens_BS, n - 1 - offset, axis=1) == last_B1)

    # Columns whose n - 1 tokens before equal the last n - 1 tokens: choosing such a column's token repeats an n-gram.
    ends_BS = (columns_S >= n - 1) & (columns_S < length_B1)
    ends_BS = jax.lax.fori_loop(0, n - 1, same, ends_BS)
    rows_B1 = jnp.arange(tokens_BS.shape[0])[:, None]
    ruled_out_BV = jnp.zeros(logits_BV.shape, bool).at[rows_B1, tokens_BS].max(ends_BS)
    return jnp.where(ruled_out_BV, -jnp.inf, logits_BV)
