"""Continuations of prompts: one compiled loop over a cache of keys and values.

Dimension key: B prompts, T prompt length, S prompt and new tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.checkpoint.weights import model_from_weights
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model.gpt2 import GPT2, Cache
from gpt2_flax.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the order of the filters is that of `transformers`."""

    temperature: float = 1.0
    """0 takes the most likely token (greedy)."""
    top_k: int = 0
    """Only the k most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability (Holtzman et al., arXiv:1904.09751)."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens seen before less likely (Keskar et al., arXiv:1909.05858)."""


def generate(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> list[list[int]]:
    """Returns the new ids after each prompt, up to and without `eos_id`.

    Prompts may differ in length and must not be empty. Raises `UserError` (DATA) when a prompt leaves no room for a
    token; `max_new_tokens` is cut so that the longest prompt stays within n_positions.
    """
    longest = max(len(prompt) for prompt in prompts)
    room = model.cfg.n_positions - longest
    if room < 1:
        what = f"prompt of {longest} tokens leaves no room in {model.cfg.n_positions} positions"
        raise UserError(ExitCode.DATA, what, "prompt", f"shorten it to at most {model.cfg.n_positions - 1} tokens")
    tokens_BT = np.zeros((len(prompts), longest), np.int32)
    first_column_B = np.array([longest - len(prompt) for prompt in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, first_column_B[row] :] = prompt
    new = min(max_new_tokens, room)
    out = _generate(model, tokens_BT, first_column_B, jax.random.key(seed), eos_id, sampling, new)
    # Every process gets all rows, wherever a sharded model has left them.
    rows = multihost_utils.process_allgather(out, tiled=True)[:, longest:].tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def generate_text(
    source: Source, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int
) -> list[str]:
    """Returns each prompt with its continuation, computed in float32."""
    tokenizer = load_tokenizer(source.tokenizer_folder)
    model = model_from_weights(source.model.model_copy(update={"dtype": "float32"}), source.weights)
    return continue_texts(model, tokenizer, prompts, max_new_tokens, sampling, seed)


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of texts that a document begins with."""
    return [[tokenizer.bos_id, *ids.tolist()] for ids in tokenizer.encode_batch(prompts)]


def continue_texts(
    model: GPT2, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int
) -> list[str]:
    """Returns each prompt with its continuation."""
    ids, texts = prompt_ids(tokenizer, prompts), []
    new_ids = generate(model, ids, tokenizer.eos_id, max_new_tokens, sampling, seed)
    for prompt, before, after in zip(prompts, ids, new_ids, strict=True):
        # Decoded together, so that a blank between prompt and continuation is kept; the prompt stays as it was typed.
        whole, start = tokenizer.decode(before + after), tokenizer.decode(before)
        texts.append(prompt + whole[len(start) :] if whole.startswith(start) else whole)
    return texts


@partial(jax.jit, static_argnames=("eos_id", "sampling", "n_new"))
def _generate(model, tokens_BT, first_column_B, key, eos_id: int, sampling: Sampling, n_new: int) -> jax.Array:
    """Returns tokens_BS, S = T + n_new; rows are filled with `eos_id` once they have ended."""
    n_rows, length = tokens_BT.shape
    tokens_BS = jnp.concatenate([tokens_BT, jnp.full((n_rows, n_new), eos_id)], axis=1)
    real_BT = jnp.arange(length) >= first_column_B[:, None]
    row_B1 = jnp.arange(n_rows)[:, None]
    seen_BV = jnp.zeros((n_rows, model.cfg.vocab_size), bool).at[row_B1, tokens_BT].max(real_BT)
    positions_BT = jnp.maximum(jnp.arange(length) - first_column_B[:, None], 0)
    cache = Cache.empty(model.cfg, n_rows, length + n_new)
    logits_BV, cache = model.decode(tokens_BT, positions_BT, first_column_B, cache)

    def going(carry):
        column, _, _, _, ended_B, _ = carry
        return (column < length + n_new) & ~ended_B.all()

    def advance(carry):
        column, tokens_BS, logits_BV, seen_BV, ended_B, cache = carry
        chosen_B = _choose(logits_BV, seen_BV, sampling, jax.random.fold_in(key, column))
        chosen_B = jnp.where(ended_B, eos_id, chosen_B)
        tokens_BS = tokens_BS.at[:, column].set(chosen_B)
        seen_BV = seen_BV.at[row_B1[:, 0], chosen_B].set(True)
        positions_B1 = (column - first_column_B)[:, None]
        logits_BV, cache = model.decode(chosen_B[:, None], positions_B1, first_column_B, cache)
        return column + 1, tokens_BS, logits_BV, seen_BV, ended_B | (chosen_B == eos_id), cache

    start = (jnp.int32(length), tokens_BS, logits_BV, seen_BV, jnp.zeros(n_rows, bool), cache)
    return jax.lax.while_loop(going, advance, start)[1]


def _choose(logits_BV: jax.Array, seen_BV: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Returns the next token of each row, int32 (B,)."""
    logits_BV = filtered_logits(logits_BV, seen_BV, sampling)
    if sampling.temperature == 0.0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)


def filtered_logits(logits_BV: jax.Array, seen_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns what is sampled from: -inf for the tokens that `sampling` rules out, and never for all of a row.

    seen_BV: bool, the tokens of the prompt and of what was generated so far. Equal logits stay or go together.
    """
    if sampling.repetition_penalty != 1.0:
        penalty = sampling.repetition_penalty
        punished_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, punished_BV, logits_BV)
    if sampling.temperature == 0.0:
        return logits_BV
    logits_BV = logits_BV / max(sampling.temperature, 1e-6)  # below that it is greedy, and would overflow
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1.0:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probability_BV = jax.nn.softmax(sorted_BV)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        stays_BV = (before_BV < sampling.top_p).at[:, 0].set(True)  # also when top_p is 0
        least_B1 = jnp.where(stays_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV
