"""Continuations of prompts of token ids: a compiled loop over a cache of keys and values.

Programs are compiled for a few sizes of batch, prompt and text, and serve all prompts that fit into them. Where a text
repeats itself, a step checks several drafted tokens at once (see `prompt_lookup`): the same text comes in fewer steps.
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
from gpt2_flax.inference.prompt_lookup import draft_tokens
from gpt2_flax.inference.sampling import History, Sampling, SamplingArrays, next_tokens
from gpt2_flax.model.decoding import Cache, Decoder

_PLAIN = Sampling()


def drafts(n_rows: int) -> tuple[int, float]:
    """Return how many drafted tokens a step checks, and the least share of accepted drafts for which that pays off."""
    # Up to 32 tokens a step: on a CPU it takes 1.5 to 1.8 times as long as a step of one token a row. With many
    # rows, products take as long to compute as to read weights, and two tokens a row take 1.2 times as long as one.
    n_drafts = min(max(32 // n_rows - 1, 1), 7)
    return n_drafts, 0.45 if n_drafts > 1 else 0.25


class State(NamedTuple):
    """A batch of texts in progress."""

    history: History
    cache: Cache
    """Keys and values of all tokens but the last one of each row."""
    ended_B: jax.Array
    accepted_B: jax.Array
    """The share of recent first drafts that the model accepted, a moving average."""


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    max_new_tokens: int,
    sampling: Sampling = _PLAIN,
    seed: int = 0,
    first_row: int = 0,
) -> list[list[int]]:
    """Return the new ids after each prompt, without `eos_id`, at most up to the last position of the model.

    Prompts may differ in length and must not be empty. A text does not depend on the other prompts: it is sampled by
    `seed` and by its row, counted from `first_row`.

    Raises:
        UserError: DATA, when a prompt leaves no room for a token.
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
    """Yield the ids that `generate` would return for one prompt as they come; raise at once what it would raise."""
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
    """The constants of a batch of texts in progress."""

    decoder: Decoder
    sampling: SamplingArrays
    keys_B: jax.Array
    eos_id: int
    stop_B: np.ndarray
    """The most tokens of each row; 0 for rows that only fill up the batch."""

    @classmethod
    def of(cls, decoder, prompts, eos_id, max_new_tokens, sampling, seed, first_row) -> "_Task":
        n_positions, n_rows = decoder.cfg.n_positions, compiled_size(len(prompts), 1)
        if (longest := max(map(len, prompts))) >= n_positions:
            what = f"prompt of {longest} tokens leaves no room in {n_positions} positions"
            raise UserError(ExitCode.DATA, what, "prompt", f"shorten it to at most {n_positions - 1} tokens")
        stop_B = np.zeros(n_rows, np.int32)
        stop_B[: len(prompts)] = [min(len(prompt) + max_new_tokens, n_positions) for prompt in prompts]
        # A key depends on its row alone, so that a row samples the same tokens in any batch.
        rows_B = np.arange(first_row, first_row + n_rows)
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)
        return cls(decoder, sampling.arrays(decoder.cfg.vocab_size), keys_B, eos_id, stop_B)

    def start(self, prompts: Sequence[Sequence[int]]) -> State:
        """Return the state after the prompts."""
        n_rows = len(self.stop_B)
        tokens_BT = np.zeros((n_rows, compiled_size(max(map(len, prompts)), 16)), np.int32)
        length_B = np.ones(n_rows, np.int32)
        for row, prompt in enumerate(prompts):
            length_B[row] = len(prompt)
            tokens_BT[row, : len(prompt)] = prompt
        n_columns = compiled_size(max(tokens_BT.shape[1], int(self.stop_B.max())), 16) + drafts(n_rows)[0]
        return read_prompts(self.decoder, tokens_BT, length_B, n_columns)

    def advance(self, state: State, until_B: np.ndarray) -> State:
        """Run steps until each row has ended or has `until_B` tokens; accepted drafts may add more."""
        n_drafts, least_accepted = drafts(len(self.stop_B))
        running, drafting = True, False
        while running:
            state, running, drafting = run_steps(self, until_B, least_accepted, state, n_drafts if drafting else 0)
        return state

    def live_B(self, state: State) -> jax.Array:
        """Return which rows may get more tokens, bool."""
        return ~state.ended_B & (state.history.length_B < self.stop_B)


def compiled_size(needed: int, least: int) -> int:
    """Return the smallest of a few sizes, four to a doubling, that is at least `needed` and at least `least`."""
    size = max(needed, least)
    step = max(least, 2 ** (size.bit_length() - 3))
    return -(-size // step) * step


@partial(jax.jit, static_argnames="n_columns")
def read_prompts(decoder: Decoder, tokens_BT, length_B, n_columns: int) -> State:
    """Return the state after prompts that are padded on the right."""
    n_rows, length = tokens_BT.shape
    rows_B1 = jnp.arange(n_rows)[:, None]
    seen_BV = jnp.zeros((n_rows, decoder.cfg.vocab_size), bool)
    seen_BV = seen_BV.at[rows_B1, tokens_BT].max(jnp.arange(length) < length_B[:, None])
    _, cache = decoder(tokens_BT, jnp.zeros_like(length_B), Cache.empty(decoder.cfg, n_rows, n_columns))
    tokens_BS = jnp.pad(tokens_BT, ((0, 0), (0, n_columns - length)))
    history = History(tokens_BS, length_B, seen_BV)
    return State(history, cache, jnp.zeros(n_rows, bool), jnp.zeros(n_rows))


@partial(jax.jit, donate_argnames="state", static_argnames="n_drafts")
def run_steps(task: _Task, until_B, least_accepted, state: State, n_drafts: int) -> tuple[State, jax.Array, jax.Array]:
    """Run steps while checking `n_drafts` drafted tokens in each step pays off.

    Returns:
        The state, whether `_Task.advance` needs more steps, and whether these should use drafts.
    """

    def running(state: State) -> jax.Array:
        return (task.live_B(state) & (state.history.length_B < until_B)).any()

    def drafting(state: State) -> jax.Array:
        return (jnp.where(task.live_B(state), state.accepted_B - least_accepted, 0)).sum() > 0

    def same(state: State) -> jax.Array:
        return running(state) & (drafting(state) == (n_drafts > 0))

    state = jax.lax.while_loop(same, partial(_step, task, n_drafts), state)
    return state, running(state), drafting(state)


def _step(task: _Task, n_drafts: int, state: State) -> State:
    """Run the model once on each row's last token and `n_drafts` drafted tokens, and add the tokens that it chooses."""
    history = state.history
    drafts_BT = draft_tokens(history.tokens_BS, history.length_B, max(n_drafts, 1))
    last_B1 = jnp.take_along_axis(history.tokens_BS, history.length_B[:, None] - 1, axis=1)
    tokens_BT = jnp.concatenate([last_B1, drafts_BT[:, :n_drafts]], axis=1)
    x_BTD, cache = task.decoder(tokens_BT, history.length_B - 1, state.cache)
    logits_BTV = task.decoder.logits(x_BTD)

    def choosing(carry):
        column, _, _, live_B = carry
        return (column <= n_drafts) & live_B.any()

    def choose_one(carry):
        """Add the token after `column` to the live rows: those whose drafts were accepted up to this column."""
        column, history, ended_B, live_B = carry
        logits_BV = jax.lax.dynamic_index_in_dim(logits_BTV, column, axis=1, keepdims=False)
        # Keys depend on positions, so that samples do not depend on the number of tokens in a step.
        position_keys_B = jax.vmap(jax.random.fold_in)(task.keys_B, history.length_B)
        chosen_B = next_tokens(logits_BV, history, task.sampling, position_keys_B, task.eos_id)
        history = history.added(chosen_B, live_B)
        ended_B |= live_B & (chosen_B == task.eos_id)
        draft_B = jax.lax.dynamic_index_in_dim(drafts_BT, column, axis=1, keepdims=False)
        live_B = live_B & ~ended_B & (chosen_B == draft_B) & (history.length_B < task.stop_B)
        return column + 1, history, ended_B, live_B

    carry = 0, history, state.ended_B, task.live_B(state)
    _, history, ended_B, _ = jax.lax.while_loop(choosing, choose_one, carry)
    first_B1 = jnp.take_along_axis(history.tokens_BS, state.history.length_B[:, None], axis=1)
    accepted_B = 0.8 * state.accepted_B + 0.2 * (first_B1 == drafts_BT[:, :1])[:, 0]
    return State(history, cache, ended_B, accepted_B)
