"""Drafts of the next tokens by prompt lookup, which the model then checks all at once.

A model often repeats what a text has said before, so the tokens that followed an earlier match are a good draft. The
model checks a draft in about the time of one token, and keeps the tokens that it would have chosen itself (Leviathan et
al., arXiv:2211.17192; the lookup: Saxena, github.com/apoorvumang/prompt-lookup-decoding).

Dimension key: B rows, S columns, T tokens of a draft.
"""

import jax
import jax.numpy as jnp

_LONGEST_MATCH = 3


def draft_tokens(tokens_BS: jax.Array, length_B: jax.Array, n_drafts: int) -> jax.Array:
    """Return drafts_BT, `n_drafts` tokens to follow the first `length_B` tokens of each row.

    A draft continues the most recent of the longest earlier matches of the row's last tokens, up to three. It repeats
    cyclically if it runs past the end. Without a match, the draft is arbitrary.
    """
    n_columns = tokens_BS.shape[1]
    columns_S, last_B1 = jnp.arange(n_columns), length_B[:, None] - 1
    matches_BS = columns_S < last_B1
    run_BS = jnp.zeros(tokens_BS.shape, jnp.int32)
    for offset in range(_LONGEST_MATCH):
        # A row that is shorter than a match compares columns behind its end, and so at most drafts badly.
        wanted_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(last_B1 - offset, 0), axis=1)
        matches_BS &= (jnp.roll(tokens_BS, offset, axis=1) == wanted_B1) & (columns_S >= offset)
        run_BS += matches_BS
    # One number orders matches by length and then by column.
    best_B1 = jnp.where(columns_S < last_B1, run_BS * n_columns + columns_S, 0).max(-1, keepdims=True)
    end_B1 = best_B1 % n_columns
    period_B1 = jnp.maximum(last_B1 - end_B1, 1)
    return jnp.take_along_axis(tokens_BS, end_B1 + 1 + jnp.arange(n_drafts) % period_B1, axis=1)
