"""Continuations of prompts that are ids: a compiled loop over a cache of keys and values.

Programs are compiled for a few sizes of batch, prompt and text, and serve all prompts that fit into them. Where a text
repeats itself, a step checks several tokens that were looked up in it; the text is the same, it only comes faster.
Dimension key: B prompts, T tokens of the prompts or of a step, S columns of prompts and new tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.inference.prompt_lookup import look_up
from gpt2_flax.inference.sampling import History, Sampling, SamplingArrays, choose
from gpt2_flax.model.decoding import Cache, Decoder

_PLAIN = Sampling()


class Drafts(NamedTuple):
    """How many tokens a step checks besides the one that is known, and when it does."""

    n_drafts: int
    least_right: float
    """The share of first guesses that must have been right lately."""


def _drafts(n_rows: int) -> Drafts:
    # Up to 32 tokens a step: on a CPU it takes 1.5 to 1.8 times as long as one of a token of each row. For many rows,
    # whose products compute as long as they read weights, two tokens of each take 1.2 times as long as one.
    n_drafts = min(max(32 // n_rows - 1, 1), 7)
    return Drafts(n_drafts, 0.45 if n_drafts > 1 else 0.25)


class State(NamedTuple):
    """Of a batch that is being continued."""

    history: History
    cache: Cache
    """Of all tokens but the last one of each row."""
    ended_B: jax.Array
    right_B: jax.Array
    """Which share of the tokens had been looked up right lately, a moving average."""


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    max_new_tokens: int,
    sampling: Sampling = _PLAIN,
    seed: int = 0,
    first_row: int = 0,
) -> list[list[int]]:
    """Returns the new ids after each prompt, up to and without `eos_id`, or up to the last of n_positions.

    Prompts may differ in length and must not be empty. What comes after one depends on no other: draws differ by seed,
    and by its place among the prompts, counted from `first_row`. Raises `UserError` (DATA) when a prompt leaves no room
    for a token.
    """
    task = _Task.of(decoder, prompts, eos_id, max_new_tokens, sampling, seed, first_row)
    history = task.advance(task.start(prompts), task.stop_B).history
    # Every process gets all rows, wherever a sharded model has left them.
    tokens_BS, length_B = multihost_utils.process_allgather((history.tokens_BS, history.length_B), tiled=True)
    rows = [tokens_BS[row, len(prompt) : length_B[row]].tolist() for row, prompt in enumerate(prompts)]
    return [row[:-1] if row[-1:] == [eos_id] else row for row in rows]


def generate_one(
    decoder: Decoder, prompt: Sequence[int], eos_id: int, max_new_tokens: int, sampling: Sampling, seed: int
) -> Iterator[int]:
    """Yields the ids that `generate` would return for one prompt, each as it comes; raises the same, and at once."""
    task = _Task.of(decoder, [prompt], eos_id, max_new_tokens, sampling, seed, 0)
    state = task.start([prompt])

    def ids(state: State) -> Iterator[int]:
        length = len(prompt)
        while length < task.stop_B[0]:
            state = task.advance(state, np.full_like(task.stop_B, length + 1))
            tokens_S, before, length = state.history.tokens_BS[0], length, int(state.history.length_B[0])
            for token in np.asarray(tokens_S)[before:length].tolist():
                if token == eos_id:
                    return
                yield token

    return ids(state)


class _Task(NamedTuple):
    """What stays the same while a batch is continued."""

    decoder: Decoder
    sampling: SamplingArrays
    keys_B: jax.Array
    eos_id: int
    stop_B: np.ndarray
    """The length that each row gets at most; 0 for rows that are none."""

    @classmethod
    def of(cls, decoder, prompts, eos_id, max_new_tokens, sampling, seed, first_row) -> "_Task":
        n_positions, n_rows = decoder.cfg.n_positions, _size(len(prompts), 1)
        if (longest := max(map(len, prompts))) >= n_positions:
            what = f"prompt of {longest} tokens leaves no room in {n_positions} positions"
            raise UserError(ExitCode.DATA, what, "prompt", f"shorten it to at most {n_positions - 1} tokens")
        stop_B = np.zeros(n_rows, np.int32)
        stop_B[: len(prompts)] = [min(len(prompt) + max_new_tokens, n_positions) for prompt in prompts]
        # Of a row alone, so that it draws the same in any batch.
        rows_B = np.arange(first_row, first_row + n_rows)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)
        return cls(decoder, sampling.arrays(decoder.cfg.vocab_size), keys_B, eos_id, stop_B)

    def start(self, prompts: Sequence[Sequence[int]]) -> State:
        """Returns the state after the prompts."""
        n_rows = len(self.stop_B)
        tokens_BT = np.zeros((n_rows, _size(max(map(len, prompts)), 16)), np.int32)
        length_B = np.ones(n_rows, np.int32)
        for row, prompt in enumerate(prompts):
            length_B[row] = len(prompt)
            tokens_BT[row, : len(prompt)] = prompt
        n_columns = _size(max(tokens_BT.shape[1], int(self.stop_B.max())), 16) + _drafts(n_rows).n_drafts
        return _read_prompts(self.decoder, tokens_BT, length_B, n_columns)

    def advance(self, state: State, until_B: np.ndarray) -> State:
        """Adds tokens until each row has ended or has the length `until_B`, or some more where they were drafted."""
        drafts, going, drafting = _drafts(len(self.stop_B)), True, False
        while going:
            n_drafts = drafts.n_drafts if drafting else 0
            state, going, drafting = _advance(*self, until_B, drafts.least_right, state, n_drafts)
        return state


def _size(needed: int, least: int) -> int:
    """Returns the smallest of a few sizes, four to a doubling, that is large enough."""
    size = max(needed, least)
    step = max(least, 2 ** (size.bit_length() - 3))
    return -(-size // step) * step


@partial(jax.jit, static_argnames="n_columns")
def _read_prompts(decoder: Decoder, tokens_BT, length_B, n_columns: int) -> State:
    """Returns the state after prompts that are padded on the right."""
    n_rows, length = tokens_BT.shape
    rows_B1 = jnp.arange(n_rows)[:, None]
    seen_BV = jnp.zeros((n_rows, decoder.cfg.vocab_size), bool)
    seen_BV = seen_BV.at[rows_B1, tokens_BT].max(jnp.arange(length) < length_B[:, None])
    _, cache = decoder(tokens_BT, jnp.zeros_like(length_B), Cache.empty(decoder.cfg, n_rows, n_columns))
    tokens_BS = jnp.pad(tokens_BT, ((0, 0), (0, n_columns - length)))
    history = History(tokens_BS, length_B, seen_BV)
    return State(history, cache, jnp.zeros(n_rows, bool), jnp.zeros(n_rows))


@partial(jax.jit, donate_argnames="state", static_argnames="n_drafts")
def _advance(
    decoder: Decoder,
    sampling: SamplingArrays,
    keys_B,
    eos_id,
    stop_B,
    until_B,
    least_right,
    state: State,
    n_drafts: int,
) -> tuple[State, jax.Array, jax.Array]:
    """Advances as `_Task.advance`, and as long as it is right to check `n_drafts` tokens at once, 0 or more.

    Returns also whether there is more to do, and whether with drafts then.
    """

    def live(state: State) -> jax.Array:
        return ~state.ended_B & (state.history.length_B < stop_B)

    def going(state: State) -> jax.Array:
        return (live(state) & (state.history.length_B < until_B)).any()

    def drafting(state: State) -> jax.Array:
        return (jnp.where(live(state), state.right_B - least_right, 0)).sum() > 0

    def step(state: State) -> State:
        history, live_B = state.history, live(state)
        drafts_BT = look_up(history.tokens_BS, history.length_B, max(n_drafts, 1))
        last_B1 = jnp.take_along_axis(history.tokens_BS, history.length_B[:, None] - 1, axis=1)
        tokens_BT = jnp.concatenate([last_B1, drafts_BT[:, :n_drafts]], axis=1)
        x_BTD, cache = decoder(tokens_BT, history.length_B - 1, state.cache)
        logits_BTV = decoder.logits(x_BTD)

        def choosing(carry):
            column, _, _, live_B = carry
            return (column <= n_drafts) & live_B.any()

        def choose_one(carry):
            """Adds the token after `column` to the rows that are live, whose drafts were right up to there."""
            column, history, ended_B, live_B = carry
            logits_BV = jax.lax.dynamic_index_in_dim(logits_BTV, column, axis=1, keepdims=False)
            # By position, so that a draw does not depend on how many tokens a step has.
            position_keys_B = jax.vmap(jax.random.fold_in)(keys_B, history.length_B)
            chosen_B = choose(logits_BV, history, sampling, position_keys_B, eos_id)
            history = history.added(chosen_B, live_B)
            ended_B |= live_B & (chosen_B == eos_id)
            draft_B = jax.lax.dynamic_index_in_dim(drafts_BT, column, axis=1, keepdims=False)
            return column + 1, history, ended_B, live_B & ~ended_B & (chosen_B == draft_B) & (history.length_B < stop_B)

        _, history, ended_B, _ = jax.lax.while_loop(choosing, choose_one, (0, history, state.ended_B, live_B))
        first_B1 = jnp.take_along_axis(history.tokens_BS, state.history.length_B[:, None], axis=1)
        right_B = 0.8 * state.right_B + 0.2 * (first_B1 == drafts_BT[:, :1])[:, 0]
        return State(history, cache, ended_B, right_B)

    state = jax.lax.while_loop(lambda state: going(state) & (drafting(state) == (n_drafts > 0)), step, state)
    return state, going(state), drafting(state)
