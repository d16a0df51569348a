import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import batches_of
from support.split_mix import mix

from gpt2_flax.data.batches import permutation
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.packing import IGNORE


@pytest.fixture(scope="module")
def split(dataset_folder):
    return TokenDataset(dataset_folder).train


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_permutation_is_a_bijection(size, seed, epoch):
    order = permutation(np.arange(size), size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))


@given(st.integers(1, 2**48), st.integers(0, 2**32 - 1), st.data())
def test_permutation_of_huge_sizes_stays_inside_and_is_injective(size, seed, data):
    index = np.unique(np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50))))
    order = permutation(index, size, seed, 0)
    assert ((order >= 0) & (order < size)).all()
    assert len(np.unique(order)) == len(index)
    assert [int(permutation(np.array(one), size, seed, 0)) for one in index] == order.tolist()


def test_epochs_and_seeds_give_different_orders():
    orders = {tuple(permutation(np.arange(500), 500, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def permuted(value, size, seed, epoch):
    """The permutation in plain Python integers."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = value >> half, value % 2**half
        for number in range(6):
            round_key = mix((mix((mix(seed) + epoch) % 2**64) + number) % 2**64)
            left, right = right, left ^ (mix((right + round_key) % 2**64) % 2**half)
        value = (left << half) + right
        if value < size:
            return value


@given(st.integers(1, 2**48), st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.data())
def test_permutation_equals_its_definition_in_python_integers(size, seed, epoch, data):
    index = data.draw(st.integers(0, size - 1))
    assert int(permutation(np.array(index), size, seed, epoch)) == permuted(index, size, seed, epoch)


def test_permutation_is_the_one_that_runs_were_started_with():
    assert permutation(np.arange(10), 10, 0, 0).tolist() == [1, 0, 7, 2, 8, 3, 4, 5, 6, 9]
    assert permutation(np.array([0, 1, 10**12 - 1]), 10**12, 7, 3).tolist() == [302902546358, 80767751393, 701348106734]


def test_permutation_is_even_over_places():
    # 400 keys, 20 places: the count of each (from, to) pair is 20 +- 4.4; chi square over 361 degrees of freedom.
    counts = np.zeros((20, 20))
    for key in range(400):
        counts[np.arange(20), permutation(np.arange(20), 20, key, 0)] += 1
    chi_square = ((counts - 20) ** 2 / 20).sum()
    assert 361 - 5 * (2 * 361) ** 0.5 < chi_square < 361 + 5 * (2 * 361) ** 0.5


@pytest.mark.parametrize("seq_length", [1, 7, 16, 1000])
def test_in_an_epoch_every_token_but_the_first_of_a_document_is_a_target_once(split, seq_length):
    loader = batches_of(split, seq_length, seed=1)
    rows = loader.batch(0, loader.rows[0].n_rows)
    targets = rows.targets_BT[rows.targets_BT != IGNORE]
    expected = np.concatenate([document[1:] for document in split.documents()])
    assert sorted(targets.tolist()) == sorted(expected.tolist())


def test_windows_in_order_are_the_stream(split):
    loader = batches_of(split, 16, seed=1)
    rows = loader.rows[0].batch(np.arange(0, loader.rows[0].n_rows + 3))
    flat = rows.tokens_BT[rows.segments_BT != 0]
    np.testing.assert_array_equal(flat[: split.n_tokens], split.read(0, split.n_tokens)[: len(flat)])
    assert not rows.segments_BT[-3:].any()
    assert (rows.targets_BT[-3:] == IGNORE).all()


@given(st.integers(0, 500), st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=20)
def test_hosts_that_take_parts_of_a_batch_see_the_whole_batch(split, start, parts):
    loader = batches_of(split, 16, seed=3)
    whole = loader.batch(start, start + sum(parts))
    bounds = np.cumsum([start, *parts])
    pieces = [loader.batch(*pair) for pair in itertools.pairwise(bounds)]
    for field, array in whole._asdict().items():
        np.testing.assert_array_equal(array, np.concatenate([getattr(piece, field) for piece in pieces]))


def test_positions_start_again_with_each_document_and_window(split):
    rows = batches_of(split, 16, seed=0).rows[0].batch(np.arange(0, 5))
    starts = set(split.document_starts(np.array([0]), split.n_tokens)[1].tolist())
    for row in range(5):
        expected = 0
        for column in range(16):
            expected = 0 if column == 0 or row * 16 + column in starts else expected + 1
            assert rows.positions_BT[row, column] == expected
