"""Filters of the next token equal the filters of `transformers`, and samples are as frequent as their probability."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_flax.inference.sampling import History, Sampling, allowed_logits, likely_logits, next_tokens

VOCABULARY, WIDTH = 60, 40


def filtered(logits_BV, tokens_BT, sampling):
    """Return the logits of the distribution to sample after `tokens_BT`."""
    history = history_of(tokens_BT)
    return np.asarray(_filtered(logits_BV, history, sampling.arrays(logits_BV.shape[1])))


@jax.jit
def _filtered(logits_BV, history, arrays):
    return likely_logits(allowed_logits(logits_BV, history, arrays), arrays)


def history_of(tokens_BT):
    n_rows, length = tokens_BT.shape
    tokens_BS = np.full((n_rows, WIDTH), 7, np.int32)
    tokens_BS[:, :length] = tokens_BT
    seen_BV = np.zeros((n_rows, VOCABULARY), bool)
    np.put_along_axis(seen_BV, tokens_BT, True, 1)
    return History(tokens_BS, np.full(n_rows, length, np.int32), seen_BV)


def their_filtered(logits_BV, tokens_BT, sampling):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    chain = [process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    if sampling.no_repeat_ngram:
        chain.append(process.NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram))
    if sampling.banned:
        chain.append(process.NoBadWordsLogitsProcessor([[token] for token in sampling.banned], eos_token_id=None))
    chain.append(process.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(process.TopKLogitsWarper(sampling.top_k))
    chain += [process.TopPLogitsWarper(sampling.top_p), process.MinPLogitsWarper(sampling.min_p)]
    scores_BV, ids_BT = torch.from_numpy(logits_BV), torch.from_numpy(tokens_BT.astype(np.int64))
    for one in chain:
        scores_BV = one(ids_BT, scores_BV)
    return scores_BV.numpy()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_k=1),
        Sampling(top_k=5),
        Sampling(top_k=1000),
        Sampling(top_p=0.0),
        Sampling(top_p=0.1),
        Sampling(top_p=0.9),
        Sampling(top_p=0.999),
        Sampling(min_p=0.05),
        Sampling(min_p=1.0),
        Sampling(repetition_penalty=1.3),
        Sampling(no_repeat_ngram=1),
        Sampling(no_repeat_ngram=2),
        Sampling(no_repeat_ngram=3),
        Sampling(banned=(0, 59, 3)),
        Sampling(1.7, 20, 0.8, min_p=0.02, repetition_penalty=2.0, no_repeat_ngram=2, banned=(1, 2)),
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(sampling):
    draw = np.random.default_rng(0)
    logits_BV = draw.normal(size=(200, VOCABULARY), scale=np.linspace(0.1, 8, 200)[:, None]).astype(np.float32)
    tokens_BT = draw.integers(0, 6 if sampling.no_repeat_ngram > 1 else VOCABULARY, (200, 15))
    expected_BV = their_filtered(logits_BV, tokens_BT, sampling)
    found_BV = filtered(logits_BV, tokens_BT, sampling)
    np.testing.assert_array_equal(np.isfinite(found_BV), np.isfinite(expected_BV))
    np.testing.assert_allclose(found_BV, expected_BV, rtol=1e-6)
    if sampling.no_repeat_ngram or sampling.banned:
        assert np.isinf(found_BV).any()


@pytest.mark.slow
@given(
    st.builds(
        Sampling,
        temperature=st.floats(0.1, 4),
        top_k=st.integers(0, 70),
        top_p=st.floats(0, 1),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(1, 3),
        no_repeat_ngram=st.integers(0, 20),
        banned=st.lists(st.integers(0, VOCABULARY - 1), max_size=5).map(tuple),
    ),
    st.integers(0, 2**32 - 1),
    st.integers(1, 16),
)
def test_any_sampling_filters_as_transformers_do(sampling, seed, length):
    draw = np.random.default_rng(seed)
    logits_BV = draw.normal(size=(3, VOCABULARY), scale=draw.uniform(0.1, 5)).astype(np.float32)
    tokens_BT = draw.integers(0, draw.choice([3, VOCABULARY]), (3, length))
    found_BV, expected_BV = (
        filtered(logits_BV, tokens_BT, sampling),
        their_filtered(logits_BV, tokens_BT, sampling),
    )
    # Sums of probabilities round differently: a token right at the border may go or stay.
    assert (np.isfinite(found_BV) != np.isfinite(expected_BV)).sum() <= 1
    both_BV = np.isfinite(found_BV) & np.isfinite(expected_BV)
    np.testing.assert_allclose(found_BV[both_BV], expected_BV[both_BV], rtol=1e-5)
    assert np.isfinite(found_BV).any(-1).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, VOCABULARY), st.booleans())
def test_top_k_keeps_the_k_likeliest_and_equal_ones_with_them(seed, top_k, ties):
    logits_1V = np.random.default_rng(seed).normal(size=(1, VOCABULARY)).astype(np.float32)
    logits_1V = np.round(logits_1V) if ties else logits_1V
    kept_1V = np.isfinite(filtered(logits_1V, np.zeros((1, 1), np.int64), Sampling(top_k=top_k)))
    np.testing.assert_array_equal(kept_1V, logits_1V >= np.sort(logits_1V)[:, -top_k])


@pytest.mark.slow
def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits_V, n = np.log(np.array([0.5, 0.2, 0.15, 0.1, 0.05], np.float32)), 20_000
    arrays = Sampling(temperature=0.5, top_k=4, top_p=0.95).arrays(5)
    history = History(np.zeros((n, 1), np.int32), np.ones(n, np.int32), np.zeros((n, 5), bool))
    keys_B = jax.random.split(jax.random.key(0), n)
    counts = np.bincount(jax.jit(next_tokens)(jnp.tile(logits_V, (n, 1)), history, arrays, keys_B, 0), minlength=5)
    # Squared and shared out: 0.25, 0.04, 0.0225 and 0.01, of which the first three hold more than 0.95.
    expected = np.array([0.25, 0.04, 0.0225, 0, 0]) / 0.3125
    assert counts[3] == counts[4] == 0
    assert np.abs(counts / n - expected).max() < 4 * math.sqrt(0.25 / n)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_document_ends_when_every_token_is_ruled_out(temperature):
    sampling = Sampling(temperature, no_repeat_ngram=1)
    history = history_of(np.array([range(30), [5] * 30]))._replace(seen_BV=np.zeros((2, 30), bool))
    keys_B = jax.random.split(jax.random.key(0), 2)
    chosen_B = jax.jit(next_tokens)(np.zeros((2, 30), np.float32), history, sampling.arrays(30), keys_B, 4)
    assert chosen_B[0] == 4
    assert chosen_B[1] != 5


@pytest.mark.slow
def test_greedy_takes_the_first_of_the_likeliest():
    logits_BV = np.zeros((2, VOCABULARY), np.float32)
    logits_BV[0, [9, 20]] = 1
    arrays = Sampling(temperature=0.0, banned=(0, 1)).arrays(VOCABULARY)
    keys_B = jax.random.split(jax.random.key(0), 2)
    chosen_B = jax.jit(next_tokens)(logits_BV, history_of(np.full((2, 1), 30)), arrays, keys_B, 4)
    assert chosen_B.tolist() == [9, 2]
