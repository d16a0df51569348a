"""Guesses of the next tokens, to be checked by the model all at once: prompt lookup.

A model repeats what a text has said before; so the tokens that followed the last ones earlier are a draft of those to
come. The model computes a draft in about the time of one token, and keeps of it what it would have chosen itself
(Leviathan et al., arXiv:2211.17192; the lookup: Saxena, github.com/apoorvumang/prompt-lookup-decoding).

Dimension key: B rows, S columns, T tokens of a draft.
"""

import jax
import jax.numpy as jnp

_LONGEST_RUN = 3


def look_up(tokens_BS: jax.Array, length_B: jax.Array, n_drafts: int) -> jax.Array:
    """Returns drafts_BT of the `n_drafts` tokens after the first `length_B` of each row.

    They are what stood after the latest of the places before at which most of the last three tokens stand, over and
    over again if that is near the end. Where nothing matches they are any tokens.
    """
    n_columns = tokens_BS.shape[1]
    columns_S, last_B1 = jnp.arange(n_columns), length_B[:, None] - 1
    matches_BS = columns_S < last_B1
    run_BS = jnp.zeros(tokens_BS.shape, jnp.int32)
    for offset in range(_LONGEST_RUN):
        # A row that is not as long compares what stands behind its end, and so at most drafts badly.
        wanted_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(last_B1 - offset, 0), axis=1)
        matches_BS &= (jnp.roll(tokens_BS, offset, axis=1) == wanted_B1) & (columns_S >= offset)
        run_BS += matches_BS
    # The longest run, of equal ones the latest; its end in the same number.
    best_B1 = jnp.where(columns_S < last_B1, run_BS * n_columns + columns_S, 0).max(-1, keepdims=True)
    end_B1 = best_B1 % n_columns
    period_B1 = jnp.maximum(last_B1 - end_B1, 1)
    return jnp.take_along_axis(tokens_BS, end_B1 + 1 + jnp.arange(n_drafts) % period_B1, axis=1)
