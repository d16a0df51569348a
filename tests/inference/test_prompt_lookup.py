"""Tokens that are looked up in the text and checked together change how fast a text comes, not the text."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.inference import decode
from gpt2_flax.inference.prompt_lookup import draft_tokens
from gpt2_flax.inference.sampling import Sampling
from gpt2_flax.model.decoding import decoder_of
from gpt2_flax.model.gpt2 import GPT2

VOCABULARY = 40
GREEDY = Sampling(temperature=0.0)
NO_END = -1


def make(initializer_range):
    dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    sizes = {"vocab_size": VOCABULARY, "n_positions": 64, "n_layer": 2, "n_head": 2, "n_embd": 32}
    config = ModelConfig(**sizes, **dropouts, initializer_range=initializer_range, dtype="float32")
    return decoder_of(jax.jit(lambda: GPT2(config, rngs=nnx.Rngs(1)))())


@pytest.fixture(scope="module")
def decoder():
    """Weights large enough that the likeliest token changes from step to step."""
    return make(0.6)


def naive(tokens, n_drafts):
    """The tokens after the latest of the longest matches, read off one by one."""

    def run(end):
        return next((n for n in range(3) if end < n or tokens[end - n] != tokens[len(tokens) - 1 - n]), 3)

    end = max(range(len(tokens) - 1), key=lambda end: (run(end), end))
    whole = list(tokens)
    for _ in range(n_drafts):
        whole.append(whole[end + 1 + len(whole) - len(tokens)])
    return whole[len(tokens) :], run(end)


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=20), min_size=1, max_size=4), st.integers(1, 7))
def test_a_draft_is_what_came_after_the_longest_and_latest_match(rows, n_drafts):
    tokens_BS = np.full((len(rows), 24), 9, np.int32)
    for row, tokens in enumerate(rows):
        tokens_BS[row, : len(tokens)] = tokens
    found_BT = np.asarray(draft_tokens(tokens_BS, np.array([len(row) for row in rows]), n_drafts))
    for row, tokens in enumerate(rows):
        expected, run = naive(tokens, n_drafts)
        if run:
            assert found_BT[row].tolist() == expected


def test_a_text_without_repetition_or_of_one_token_has_some_draft():
    tokens_BS = np.array([[1, 2, 3, 4, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0]])
    assert draft_tokens(tokens_BS, np.array([4, 1]), 3).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(temperature=0.2),
        Sampling(top_k=3),
        Sampling(temperature=0.5, top_p=0.9, min_p=0.01, repetition_penalty=1.2, no_repeat_ngram=4, banned=(0, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("n_rows", [1, 10, 20])
def test_always_and_never_drafting_give_the_same_text(decoder, monkeypatch, sampling, n_rows):
    draw = np.random.default_rng(0)
    prompts = [(draw.integers(VOCABULARY, size=1 + row % 4).tolist() * 6)[: 3 + 4 * row] for row in range(n_rows)]
    eos_id, found, drafts = 5, [], decode.drafts
    for least_share in (2.0, -1.0):
        monkeypatch.setattr(decode, "drafts", lambda n, least=least_share: (drafts(n)[0], least))
        found.append(decode.generate(decoder, prompts, eos_id, 40, sampling, seed=3))
        one = list(decode.generate_one(decoder, prompts[0], eos_id, 40, sampling, 3))
        assert one == found[-1][0]
    assert found[0] == found[1]
    assert [len(row) for row in found[0]] == [len(row) for row in found[1]]
    assert all(len(prompt) + len(row) <= 64 and len(row) <= 40 for prompt, row in zip(prompts, found[0], strict=True))


@pytest.mark.slow
def test_a_text_that_repeats_itself_comes_in_fewer_steps(monkeypatch):
    """Small random weights say the same token over and over."""
    decoder, steps = make(0.02), []
    whole = decode.generate(decoder, [[3, 8], [4]], NO_END, 50, GREEDY)
    advance = decode.run_steps

    def counted(*arguments):
        before = np.asarray(arguments[-2].history.length_B)
        result = advance(*arguments)
        if n_new := int((np.asarray(result[0].history.length_B) - before).max()):
            steps.append((arguments[-1], n_new))
        return result

    monkeypatch.setattr(decode, "run_steps", counted)
    assert decode.generate(decoder, [[3, 8], [4]], NO_END, 50, GREEDY) == whole
    (narrow, few), (wide, many) = steps  # one token at a time until that is foreseen, then the rest
    assert (narrow, wide) == (0, 7)
    assert few + many == 50
    assert few < 20
    # One by one, and several in a step once they are drafted.
    steps.clear()
    assert list(decode.generate_one(decoder, [3, 8], NO_END, 50, GREEDY, 0)) == whole[0]
    assert max(n_new for _, n_new in steps) == 8
    assert len(steps) < 30
