import functools
import itertools
import json
import math
import time
from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.configs import CHARACTERS, changed
from support.rows import batches_of

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data.batches import Batches, deal, shares_of_rest
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import RowLayout
from gpt2_flax.data.prepare import prepare
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.model_card import CardFacts, model_card
from gpt2_flax.export.publish import run_facts
from gpt2_flax.inference.evaluate import evaluate_source
from gpt2_flax.inference.evaluation import Evaluation
from gpt2_flax.parallel.device_batches import device_batch
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.text.documents import DEFAULT_OPTIONS
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.tokenizers.train import train_wordpiece
from gpt2_flax.training import loop

WHOLE = st.lists(st.integers(1, 1000), min_size=1, max_size=6)
REAL = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def dealt(sample, shares):
    """The definition of the order in Python's exact numbers: (dataset, number among its samples)."""
    taken, taken_after = (math.floor(n * shares[0]) for n in (sample, sample + 1))
    if taken_after > taken:
        return 0, taken
    dataset, number = dealt(sample - taken, shares[1:])
    return dataset + 1, number


@given(st.one_of(WHOLE, REAL), st.lists(st.integers(0, 2**42 - 1), min_size=1, max_size=20))
@example([7.654321, 1.0], [2**42 - 1])
def test_the_order_equals_its_definition_in_exact_numbers(weights, samples):
    shares = shares_of_rest(weights)
    datasets, numbers = deal(np.array(samples), shares)
    assert list(zip(datasets.tolist(), numbers.tolist(), strict=True)) == [dealt(n, shares) for n in samples]


def test_the_order_is_the_one_that_runs_were_started_with():
    datasets, numbers = deal(np.arange(14), shares_of_rest([5, 3, 2.0]))
    assert datasets.tolist() == [2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0]
    assert numbers.tolist() == [0, 0, 0, 1, 1, 2, 1, 3, 2, 4, 2, 5, 3, 6]
    datasets, numbers = deal(np.arange(10**12, 10**12 + 4), shares_of_rest([1, 2.3, 4]))
    assert datasets.tolist() == [0, 2, 2, 1]
    assert numbers.tolist() == [136986301369, 547945205480, 547945205481, 315068493151]
    rows = Batches([Counting(5), Counting(8, first=100)], shares_of_rest([1, 2]), RowLayout(1), seed=7).batch(0, 12)
    assert rows.tokens_BT[:, 0].tolist() == [105, 103, 2, 101, 104, 0, 106, 100, 1, 102, 106, 3]


@given(st.one_of(WHOLE, REAL))
def test_after_any_number_of_samples_every_dataset_has_its_share_of_them_each_once_and_in_order(weights):
    samples, total = np.arange(3000), sum(map(Fraction, weights))
    datasets, numbers = deal(samples, shares_of_rest(weights))
    for dataset, weight in enumerate(weights):
        rows = datasets == dataset
        assert (numbers[rows] == np.arange(rows.sum())).all()
        errors = np.cumsum(rows) - (samples + 1) * float(Fraction(weight) / total)
        assert np.abs(errors).max() <= len(weights)


@given(WHOLE, st.integers(0, 2**42 - 3000))
def test_shares_are_exact_however_many_samples_came_before(weights, start):
    datasets, numbers = deal(np.arange(start, start + 3000), shares_of_rest(weights))
    for dataset, weight in enumerate(weights):
        own = numbers[datasets == dataset]
        assert (np.diff(own) == 1).all()
        if len(own):
            before = Fraction(start * weight, sum(weights))
            assert abs(int(own[0]) - before) <= len(weights)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.integers(1, 1000))
def test_only_the_ratio_of_weights_matters(weights, factor):
    assert shares_of_rest([weight * factor for weight in weights]) == shares_of_rest(weights)


def test_thirds_are_thirds_and_a_millionth_is_not_nothing():
    assert shares_of_rest([0.1, 0.2]) == shares_of_rest([1, 2]) == [Fraction(1, 3), 1]
    assert shares_of_rest([1, 999_999])[0] > 0
    assert shares_of_rest([999_999, 1])[0] < 1


class Counting:
    """A split whose tokens count up from `first`, with the methods of `TokenSplit` that a loader needs."""

    def __init__(self, n_tokens, first=0):
        self.n_tokens, self.first = n_tokens, first

    def gather(self, starts_N, lengths_N):
        parts = map(np.arange, self.first + starts_N, self.first + starts_N + lengths_N)
        return np.concatenate(list(parts))

    def document_starts(self, starts_N, length):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)


def test_a_single_dataset_is_dealt_as_alone():
    split = Counting(100)
    mixed, alone = Batches([split], shares_of_rest([3.5]), RowLayout(4), seed=5), batches_of(split, 4, seed=5)
    for field, array in mixed.batch(10, 90)._asdict().items():
        np.testing.assert_array_equal(array, getattr(alone.batch(10, 90), field))
        assert array.dtype == np.int32


def test_each_dataset_has_epochs_and_an_order_of_its_own():
    loader = Batches(
        [Counting(11), Counting(11, 1000), Counting(31, 2000)], shares_of_rest([1, 1, 2]), RowLayout(1), seed=3
    )
    tokens = loader.batch(0, 120).tokens_BT[:, 0]
    epochs = {}
    for first, n_windows in ((0, 10), (1000, 10), (2000, 30)):
        own = tokens[(tokens >= first) & (tokens < first + 1000)] - first
        parts = [own[start : start + n_windows] for start in range(0, len(own), n_windows)]
        assert len(parts) > 1
        assert all(sorted(part) == list(range(len(part))) for part in parts if len(part) == n_windows)
        epochs[first] = [part.tolist() for part in parts]
    assert epochs[0] != epochs[1000]
    assert all(parts[0] != parts[1] for parts in epochs.values())


@given(WHOLE, st.integers(0, 10**9), st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=50)
def test_hosts_that_take_parts_of_a_batch_see_the_whole_batch(weights, start, parts):
    splits = [Counting(40 + number, 100 * number) for number in range(len(weights))]
    loader = Batches(splits, shares_of_rest(weights), RowLayout(4), seed=2)
    whole = loader.batch(start, start + sum(parts))
    pieces = [loader.batch(*pair) for pair in itertools.pairwise(np.cumsum([start, *parts]).tolist())]
    for field, array in whole._asdict().items():
        np.testing.assert_array_equal(array, np.concatenate([getattr(piece, field) for piece in pieces]))


def test_any_number_of_devices_gets_the_same_rows():
    loader = Batches([Counting(41), Counting(99, 1000)], shares_of_rest([2, 1]), RowLayout(4), seed=2)
    for count in (1, 2, 8):
        placed = device_batch(make_mesh(MeshSizes(), jax.devices()[:count]), 16, loader.batch)
        np.testing.assert_array_equal(placed.tokens_BT, loader.batch(0, 16).tokens_BT)


def test_a_thousand_million_windows_start_at_once():
    before = time.perf_counter()
    loader = Batches([Counting(10**9 + 1), Counting(10**9 + 1)], shares_of_rest([3, 1]), RowLayout(1), seed=0)
    loader.batch(3 * 10**9, 3 * 10**9 + 1000)
    assert time.perf_counter() - before < 1


# Prepared datasets


@pytest.fixture(scope="module")
def second_folder(tokenizer_folder, tmp_path_factory):
    """A dataset of the same tokenizer with another pattern: the characters backwards, in longer documents."""
    folder = tmp_path_factory.mktemp("second")
    lines = ("".join(CHARACTERS[(n - i) % len(CHARACTERS)] for i in range(40 + n % 30)) for n in range(200))
    (folder / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    prepare([str(folder / "corpus.txt")], load_tokenizer(tokenizer_folder), folder / "dataset", validation_fraction=0.1)
    return folder / "dataset"


@pytest.fixture
def weights(dataset_folder, second_folder):
    return {str(dataset_folder): 3, str(second_folder): 1}


def metrics_of(config):
    """The metrics of each step, the last line of a step first."""
    found = {}
    for line in map(json.loads, RunFolder(config.output).metrics.read_text().splitlines()):
        found.setdefault(line["step"], {}).update(line)
    return found


@pytest.mark.slow
def test_a_run_on_two_datasets_learns_and_goes_on_with_the_same_bits(config, weights, tmp_path):
    config = changed(config, data__dataset=weights, optimizer__schedule="constant", model__resid_pdrop=0.1)
    train = functools.partial(loop.train, devices=jax.devices()[:2])
    train(config)
    whole = metrics_of(config)
    assert whole[6]["train/loss"] < whole[1]["train/loss"]

    # Of all values one mean, and those of each dataset by its name.
    parts = [whole[6][f"validation/loss/{folder}"] for folder in weights]
    assert min(parts) < whole[6]["validation/loss"] < max(parts)

    proportional = {folder: 2.5 * weight for folder, weight in weights.items()}
    again = changed(config, output=str(tmp_path / "again"), data__dataset=proportional)
    train(changed(again, training__total_steps=3))
    for wrong in ({**weights, next(iter(weights)): 4}, dict(reversed(weights.items())), next(iter(weights))):
        with pytest.raises(UserError, match="other training tokens, or shares of them") as error:
            train(changed(again, data__dataset=wrong), allow_change=["training.total_steps"])
        assert error.value.exit_code == ExitCode.CONFIG
    train(changed(again, data__dataset=weights), allow_change=["training.total_steps"])
    losses = [[step["train/loss"] for step in metrics_of(run).values()] for run in (config, again)]
    assert losses[0] == losses[1]

    # What comes after training reads the datasets of the run.
    source = load_source(Path(config.output))
    found = evaluate_source(source, None, None, n_rows=16, n_batches=1, options=DEFAULT_OPTIONS)
    assert found.loss == pytest.approx(whole[6]["validation/loss"], rel=1e-6)
    datasets = Mixture(weights).datasets
    facts = run_facts(source, source.config, datasets)
    assert facts["tokens"] == sum(dataset.train.n_tokens for dataset in datasets.values())
    card = model_card(CardFacts("a model", source.model, wordpiece=True, prompt="这", **facts))
    assert "75.0% `dataset`, 25.0% `dataset`" in card


def test_fingerprints_are_of_tokens_order_and_shares(dataset_folder, second_folder, weights):
    first, second = str(dataset_folder), str(second_folder)
    alone = Mixture({first: 7.0})
    assert alone.fingerprints() == alone.datasets[first].fingerprints()
    orders = ({first: 1, second: 3}, {second: 1, first: 3}, {second: 3, first: 1}, weights, {second: 1}, {first: 1})
    assert len({Mixture(order).fingerprints()["tokens_fingerprint"] for order in orders}) == len(orders)
    assert Mixture({first: 6, second: 2}).fingerprints() == Mixture(weights).fingerprints()


def test_datasets_of_different_tokenizers_are_refused_by_name(dataset_folder, corpus, tmp_path):
    prepare([str(corpus)], train_wordpiece(["这是很久"], 60), tmp_path / "other", allow_unknown=True)
    with pytest.raises(UserError, match="different tokenizers") as error:
        Mixture({str(dataset_folder): 1, str(tmp_path / "other"): 1})
    assert error.value.exit_code == ExitCode.CONFIG
    assert error.value.where == f"{dataset_folder} and {tmp_path / 'other'}"


def test_the_first_dataset_that_is_missing_is_named(dataset_folder, tmp_path):
    with pytest.raises(UserError, match="dataset not found") as error:
        Mixture({str(dataset_folder): 1, str(tmp_path / "none"): 1})
    assert error.value.exit_code == ExitCode.NO_INPUT
    assert str(tmp_path / "none") in error.value.where


# Figures over several splits


def test_evaluations_add_up_and_bits_are_left_out_when_characters_are_not_known():
    known, more = Evaluation(300.0, 20.0, 100, 50.0), Evaluation(100.0, 60.0, 300, 150.0)
    both = known + more
    assert (both.loss, both.accuracy, both.tokens) == (1.0, 0.2, 400)
    assert both.bits_per_character == pytest.approx(400 / math.log(2) / 200)
    assert "bits/character 2.8854  accuracy 20.0%" in str(both)
    unknown = known + Evaluation(100.0, 60.0, 300, None)
    assert unknown.bits_per_character is None
    assert "bits/character -  " in str(unknown)


def test_a_card_without_a_mixture_names_no_shares():
    facts = CardFacts("a model", ModelConfig(vocab_size=300), False, "这", mixture=(("d", 1.0),))
    assert "mixed" not in model_card(facts)
