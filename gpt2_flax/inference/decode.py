"""Continuations of prompts that are ids: a compiled loop over a cache of keys and values.

Programs are compiled for a few sizes of batch, prompt and text, and serve all prompts that fit into them.
Dimension key: B prompts, T columns of the prompts, S columns of prompts and new tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.inference.sampling import History, Sampling, SamplingArrays, choose
from gpt2_flax.model.block import Block
from gpt2_flax.model.decoding import DecodingBlock
from gpt2_flax.model.gpt2 import GPT2, Cache

Blocks = Sequence[Block] | Sequence[DecodingBlock]
_PLAIN = Sampling()


class State(NamedTuple):
    """Of a batch that is being continued."""

    history: History
    logits_BV: jax.Array
    """Of the next token."""
    cache: Cache
    ended_B: jax.Array


def generate(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    max_new_tokens: int,
    sampling: Sampling = _PLAIN,
    seed: int = 0,
    first_row: int = 0,
    blocks: Blocks | None = None,
) -> list[list[int]]:
    """Returns the new ids after each prompt, up to and without `eos_id`, or up to the last of n_positions.

    Prompts may differ in length and must not be empty. What comes after one depends on no other: draws differ by seed,
    and by its place among the prompts, counted from `first_row`. blocks: `model_blocks(model)`, if they are there.
    Raises `UserError` (DATA) when a prompt leaves no room for a token.
    """
    blocks = model_blocks(model) if blocks is None else blocks
    state, column, stop = _start(model, blocks, prompts, max_new_tokens)
    keys_B = _row_keys(seed, first_row, len(state.ended_B))
    arrays = sampling.arrays(model.cfg.vocab_size)
    tokens_BS = _advance(model, blocks, state, arrays, keys_B, eos_id, stop).history.tokens_BS
    # Every process gets all rows, wherever a sharded model has left them.
    tokens_BS = multihost_utils.process_allgather(tokens_BS, tiled=True)
    rows = [row_S[column:stop].tolist() for row_S in tokens_BS[: len(prompts)]]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def generate_one(
    model: GPT2,
    blocks: Blocks,
    prompt: Sequence[int],
    eos_id: int,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[int]:
    """Yields the ids that `generate` would return for one prompt, each as it comes; raises the same, and at once."""
    state, column, stop = _start(model, blocks, [prompt], max_new_tokens)
    keys_B, arrays = _row_keys(seed, 0, 1), sampling.arrays(model.cfg.vocab_size)

    def ids(state: State) -> Iterator[int]:
        for last in range(column, stop):
            state = _advance(model, blocks, state, arrays, keys_B, eos_id, last + 1)
            if (token := int(state.history.tokens_BS[0, last])) == eos_id:
                return
            yield token

    return ids(state)


@jax.jit
def model_blocks(model: GPT2) -> Blocks:
    """Returns the layers as `_advance` reads them fastest; under a mesh as they are, for its layouts."""
    blocks = model.blocks()
    return tuple(map(DecodingBlock.of, blocks)) if jax.sharding.get_abstract_mesh().empty else blocks


def _start(
    model: GPT2, blocks: Blocks, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[State, int, int]:
    """Returns the state after the prompts, the column of the first new token, and that after the last one."""
    longest, shortest = max(map(len, prompts)), min(map(len, prompts))
    if longest >= model.cfg.n_positions:
        what = f"prompt of {longest} tokens leaves no room in {model.cfg.n_positions} positions"
        raise UserError(ExitCode.DATA, what, "prompt", f"shorten it to at most {model.cfg.n_positions - 1} tokens")
    n_new = min(max_new_tokens, model.cfg.n_positions - shortest)
    n_rows, length = _size(len(prompts), 1), _size(longest, 16)
    tokens_BT = np.zeros((n_rows, length), np.int32)
    first_column_B = np.full(n_rows, length - 1, np.int32)
    for row, prompt in enumerate(prompts):
        first_column_B[row] = length - len(prompt)
        tokens_BT[row, first_column_B[row] :] = prompt
    state = _read_prompts(model, blocks, tokens_BT, first_column_B, len(prompts), _size(length + n_new, 16))
    return state, length, length + n_new


def _size(needed: int, least: int) -> int:
    """Returns the smallest of a few sizes, four to a doubling, that is large enough."""
    size = max(needed, least)
    step = max(least, 2 ** (size.bit_length() - 3))
    return -(-size // step) * step


def _row_keys(seed: int, first_row: int, n_rows: int) -> jax.Array:
    rows_B = np.arange(first_row, first_row + n_rows)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)


@partial(jax.jit, static_argnames="n_columns")
def _read_prompts(model, blocks, tokens_BT, first_column_B, n_prompts, n_columns: int) -> State:
    """Returns the state after left-padded prompts; the rows from `n_prompts` on are none."""
    n_rows, length = tokens_BT.shape
    real_BT = jnp.arange(length) >= first_column_B[:, None]
    rows_B1 = jnp.arange(n_rows)[:, None]
    seen_BV = jnp.zeros((n_rows, model.cfg.vocab_size), bool).at[rows_B1, tokens_BT].max(real_BT)
    positions_BT = jnp.maximum(jnp.arange(length) - first_column_B[:, None], 0)
    cache = Cache.empty(model.cfg, n_rows, n_columns)
    logits_BV, cache = model.decode(tokens_BT, positions_BT, first_column_B, cache, blocks)
    tokens_BS = jnp.pad(tokens_BT, ((0, 0), (0, n_columns - length)))
    history = History(tokens_BS, first_column_B, jnp.int32(length), seen_BV)
    return State(history, logits_BV, cache, jnp.arange(n_rows) >= n_prompts)


@partial(jax.jit, donate_argnames="state")
def _advance(model, blocks, state: State, sampling: SamplingArrays, keys_B, eos_id, stop) -> State:
    """Adds tokens up to column `stop`, or until all rows have ended; a row that has ended gets `eos_id`s."""
    rows_B = jnp.arange(keys_B.shape[0])

    def going(state):
        return (state.history.column < stop) & ~state.ended_B.all()

    def advance(state):
        tokens_BS, first_column_B, column, seen_BV = state.history
        positions_B = column - first_column_B
        # By position, so that a draw does not depend on how prompts were padded.
        position_keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
        chosen_B = choose(state.logits_BV, state.history, sampling, position_keys_B, eos_id)
        full_B = positions_B >= model.cfg.n_positions
        chosen_B = jnp.where(state.ended_B | full_B, eos_id, chosen_B)
        history = History(
            tokens_BS.at[:, column].set(chosen_B),
            first_column_B,
            column + 1,
            seen_BV.at[rows_B, chosen_B].set(True),
        )
        positions_B1 = jnp.minimum(positions_B, model.cfg.n_positions - 1)[:, None]
        logits_BV, cache = model.decode(chosen_B[:, None], positions_B1, first_column_B, state.cache, blocks)
        return State(history, logits_BV, cache, state.ended_B | full_B | (chosen_B == eos_id))

    return jax.lax.while_loop(going, advance, state)
