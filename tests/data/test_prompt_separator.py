"""End tokens inside segments: against a definition in plain Python, and properties that do not depend on it."""

import itertools
from fractions import Fraction
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import changed
from support.rows import batches_of
from support.split_mix import mix
from support.token_datasets import write_dataset

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config.parse import parse_config
from gpt2_flax.data.batches import Batches, rows_of, shares_of_rest
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import IGNORE, Batch, RowLayout, row_layout
from gpt2_flax.data.prompt_separator import PromptSeparator, SeparatedBatches
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.inference import evaluation
from gpt2_flax.parallel.device_batches import device_batch
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.training import loop
from gpt2_flax.training.open_stage import check_same_config

BOS, EOS, FIRST = 0, 1, 5  # as `write_dataset` records; other tokens count on from FIRST
LAYOUTS = [
    RowLayout(length, packing, across)
    for length in (1, 2, 8, 30)
    for packing in ("stream", "best_fit", "document")
    for across in (False, True)
]
SHARES = st.sampled_from([0.1, 0.5, 1.0])
SEEDS = st.sampled_from([0, 7, 2**32 - 1])
TEXTS = st.lists(st.integers(0, 40), min_size=1, max_size=12)  # lengths of documents without their ends
ALL = (3, 50)  # samples of several epochs


def documents_of(lengths, with_bos=True):
    tokens = itertools.count(FIRST)
    bos = [BOS] if with_bos else []
    return [[*bos, *itertools.islice(tokens, length), EOS] for length in lengths]


def split_of(folder, documents):
    return write_dataset(folder, 2**17, [documents]).train


def separated(splits, layout, seed, share, bos=BOS):
    shares = shares_of_rest([1] * len(splits))
    return SeparatedBatches(splits, shares, layout, seed, PromptSeparator(share, seed, bos, EOS))


def by_hand(batch, first, seed, share):
    """The definition, segment by segment, in Python integers: (tokens, targets) of each row."""
    rows = []
    for sample, row in enumerate(zip(*(array_BT.tolist() for array_BT in batch), strict=True), first):
        tokens, targets, segments, _ = row
        new_tokens, new_targets = [], []
        for number, group in itertools.groupby(range(len(tokens)), key=segments.__getitem__):
            columns = list(group)
            t, y = ([values[column] for column in columns] for values in (tokens, targets))
            key = mix((mix((mix(2**63 + seed) + sample) % 2**64) + number) % 2**64)
            places = [p for p in range(1, len(t)) if t[p - 1] != BOS and y[p - 1] not in (IGNORE, EOS)]
            if Fraction(key >> 11, 2**53) < Fraction(share) and places:
                p = places[(mix(key) >> 32) * len(places) >> 32]
                t, y = [*t[:p], EOS, *t[p:-1]], [*y[:p], y[p - 1], *y[p:-1]]
            new_tokens += t
            new_targets += y
        rows.append((new_tokens, new_targets))
    return rows


def segments_of(before, after):
    """(tokens, targets before; tokens, targets after) of each segment of both batches, without padding."""
    for row in zip(before.segments_BT, *before[:2], *after[:2], strict=True):
        segments_T, *values = (array_T.tolist() for array_T in row)
        for number, group in itertools.groupby(range(len(segments_T)), key=segments_T.__getitem__):
            columns = list(group)
            if number:
                yield [[array[column] for column in columns] for array in values]


def equal(some, other):
    for field, array, another in zip(Batch._fields, some, other, strict=True):
        np.testing.assert_array_equal(array, another, err_msg=field)
        assert array.dtype == another.dtype == np.int32


@settings(max_examples=80)
@given(TEXTS, TEXTS, st.booleans(), st.sampled_from(LAYOUTS), SEEDS, SHARES, st.sampled_from([ALL, (10**9, 10**9 + 9)]))
def test_batches_equal_the_definition_in_plain_python(
    tmp_path_factory, texts, more_texts, with_bos, layout, seed, share, samples
):
    folder = tmp_path_factory.mktemp("datasets")
    splits = [split_of(folder / "a", documents_of(texts, with_bos)), split_of(folder / "b", documents_of(more_texts))]
    before = Batches(splits, shares_of_rest([1, 1]), layout, seed).batch(*samples)
    after = separated(splits, layout, seed, share).batch(*samples)
    expected = by_hand(before, samples[0], seed, share)
    equal(
        after,
        before._replace(
            **{
                name: np.array(rows, np.int32)
                for name, rows in zip(("tokens_BT", "targets_BT"), zip(*expected, strict=True), strict=True)
            }
        ),
    )


@settings(max_examples=50)
@given(TEXTS, st.sampled_from(LAYOUTS), SEEDS)
def test_with_a_share_of_1_every_segment_that_has_a_place_gets_one_end_token(tmp_path_factory, texts, layout, seed):
    documents = documents_of(texts)
    owner = {token: number for number, document in enumerate(documents) for token in document[1:-1]}
    split = split_of(tmp_path_factory.mktemp("dataset"), documents)
    before = batches_of(split, layout.seq_length, seed, layout.packing, layout.attend_across_documents).batch(*ALL)
    after = separated([split], layout, seed, 1.0).batch(*ALL)
    for t, y, new_t, new_y in segments_of(before, after):
        if new_t == t:
            assert new_y == y
            inner = [target for token, target in zip(t[:-1], y, strict=False) if token != BOS]
            assert set(inner) <= {EOS, IGNORE}
            continue
        p = next(place for place, tokens in enumerate(zip(t, new_t, strict=True)) if len(set(tokens)) == 2)
        assert new_t == [*t[:p], EOS, *t[p:-1]]
        assert new_y == [*y[:p], y[p - 1], *y[p:-1]]
        # The inserted token stands inside the text of one document, and nothing is taught to predict it.
        assert owner[new_t[p - 1]] == owner[new_y[p]]
        assert new_y[p - 1] == new_y[p] == new_t[p - 1] + 1
        if t[-1] == EOS:  # of a document that ends in the segment, no target of its text or its end is lost
            assert new_y.count(EOS) == y.count(EOS)
            assert set(new_y) | {IGNORE} == set(y) | {IGNORE}


@settings(max_examples=40)
@given(TEXTS, st.sampled_from(LAYOUTS), SEEDS, SHARES)
def test_no_target_is_of_another_document(tmp_path_factory, texts, layout, seed, share):
    documents = documents_of(texts)
    owner = {token: number for number, document in enumerate(documents) for token in document[1:-1]}
    after = separated([split_of(tmp_path_factory.mktemp("dataset"), documents)], layout, seed, share).batch(*ALL)
    for tokens, targets, segments in zip(*(array_BT.tolist() for array_BT in after[:3]), strict=True):
        last = None  # the last token of text in this segment
        for column, (token, target) in enumerate(zip(tokens, targets, strict=True)):
            if (column and segments[column] != segments[column - 1]) or token == BOS:
                last = None
            last = token if token in owner else last
            if target in owner and last is not None:
                assert owner[target] == owner[last]
                assert target == last + 1


@settings(max_examples=40)
@given(
    TEXTS,
    st.sampled_from(LAYOUTS),
    SEEDS,
    SHARES,
    st.integers(0, 10**9),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_hosts_that_take_parts_of_a_batch_see_the_whole_batch(
    tmp_path_factory, texts, layout, seed, share, start, parts
):
    folder = tmp_path_factory.mktemp("datasets")
    splits = [split_of(folder / str(number), documents_of(texts[number:])) for number in range(min(2, len(texts)))]
    loader = separated(splits, layout, seed, share)
    whole = loader.batch(start, start + sum(parts))
    pieces = [loader.batch(*pair) for pair in itertools.pairwise(np.cumsum([start, *parts]).tolist())]
    equal(whole, Batch(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True))))


def test_any_number_of_devices_gets_the_same_rows(tmp_path):
    loader = separated([split_of(tmp_path, documents_of([40, 3, 17, 25]))], RowLayout(8), 3, 0.5)
    for count in (1, 2, 8):
        placed = device_batch(make_mesh(MeshSizes(), jax.devices()[:count]), 16, loader.batch, 32)
        for field, array in zip(placed, loader.batch(32, 48), strict=True):
            np.testing.assert_array_equal(field, array)


N_ROWS, N_SEGMENTS = 4000, 5
"""Rows of segments of 12 tokens: a bos, ten tokens of text and an eos, so that the eos has nine places, 2 to 10."""


def chosen_places(seed, share, first=0):
    """The place of the inserted token in each segment, (rows, segments), 0 where there is none."""
    tokens_T = [BOS, *range(FIRST, FIRST + 10), EOS]
    shape = N_ROWS, N_SEGMENTS * 12
    row = tokens_T * N_SEGMENTS, [*tokens_T[1:], IGNORE] * N_SEGMENTS
    row = *row, [1 + place // 12 for place in range(shape[1])], [place % 12 for place in range(shape[1])]
    batch = Batch(*(np.broadcast_to(np.array(values, np.int32), shape) for values in row))
    after = PromptSeparator(share, seed, BOS, EOS).inserted(batch, np.arange(first, first + N_ROWS))
    is_eos_BRT = (after.tokens_BT == EOS).reshape(N_ROWS, N_SEGMENTS, 12)[..., :-1]
    assert is_eos_BRT.sum(-1).max() == 1
    return is_eos_BRT.argmax(-1)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("share", [0.03, 0.5, 1.0])
def test_segments_are_chosen_and_places_are_taken_evenly(seed, share):
    places = chosen_places(seed, share)
    n = N_ROWS * N_SEGMENTS
    count = (places > 0).sum()
    assert abs(count - n * share) <= 5 * (n * share * (1 - share)) ** 0.5
    for number in range(N_SEGMENTS):  # no segment of a row is preferred
        of_number = (places[:, number] > 0).sum()
        assert abs(of_number - N_ROWS * share) <= 5 * (N_ROWS * share * (1 - share)) ** 0.5
    # Directly behind the bos (1) and directly before the eos (11) there is none.
    counts = np.bincount(places[places > 0], minlength=12)
    assert counts.tolist()[:2] == [0, 0]
    assert counts[11] == 0
    np.testing.assert_array_less(np.abs(counts[2:11] - count / 9), 5 * (count * 8 / 81) ** 0.5)


def test_the_choices_of_seeds_samples_and_segments_are_independent():
    one, other_seed, other_samples = chosen_places(0, 0.5), chosen_places(1, 0.5), chosen_places(0, 0.5, N_ROWS)
    pairs = [(one, other_seed), (one, other_samples), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1])]
    for a, b in pairs:
        both = ((a > 0) & (b > 0)).sum()
        assert abs(both - a.size / 4) <= 5 * (a.size * 3 / 16) ** 0.5
        same = ((a == b) & (a > 0)).sum()
        assert abs(same - a.size / 36) <= 5 * (a.size * 35 / 36**2) ** 0.5


def test_a_larger_share_chooses_the_same_segments_and_more():
    few, more = chosen_places(4, 0.2), chosen_places(4, 0.6)
    assert (few[few > 0] == more[few > 0]).all()
    assert 0 < (few > 0).sum() < (more > 0).sum()


def test_the_places_are_the_ones_that_runs_were_started_with():
    expected = [[0, 0, 7, 5, 7], [6, 0, 4, 2, 0], [0, 0, 0, 10, 10], [0, 6, 0, 9, 0]]
    assert chosen_places(7, 0.5, 10**12)[:4].tolist() == expected


def test_without_the_key_nothing_is_computed(config):
    mixture = Mixture(config.data.datasets)
    with mock.patch.object(PromptSeparator, "inserted", side_effect=AssertionError):
        for share in ({}, {"data__prompt_separator": 0.0}):
            some = changed(config, **share)
            batches = mixture.batches(row_layout(some), some.training.seed, some.data.prompt_separator)
            assert type(batches) is Batches
            batches.batch(0, 4)


def test_a_mixture_inserts_the_ids_of_its_tokenizer(config):
    mixture, layout = Mixture(config.data.datasets), row_layout(config)
    tokenizer = mixture.tokenizer()
    splits = [dataset.train for dataset in mixture.datasets.values()]
    separator = PromptSeparator(0.4, 3, tokenizer.bos_id, tokenizer.eos_id)
    expected = SeparatedBatches(splits, mixture.shares, layout, 3, separator).batch(5, 40)
    equal(mixture.batches(layout, 3, 0.4).batch(5, 40), expected)
    assert (expected.tokens_BT != mixture.batches(layout, 3).batch(5, 40).tokens_BT).any()


@pytest.mark.slow
def test_the_loop_trains_on_inserted_tokens_and_evaluates_without_them(config, monkeypatch):
    config, fed = changed(config, data__prompt_separator=1.0, training__total_steps=3), {loop: [], evaluation: []}
    for module, batches in fed.items():

        def recorded(mesh, n_rows, read, start=0, batches=batches):
            batches.append(read(start, start + n_rows))
            return device_batch(mesh, n_rows, read, start)

        monkeypatch.setattr(module, "device_batch", recorded)
    loop.train(config)
    mixture, layout = Mixture(config.data.datasets), row_layout(config)
    separated_batches = mixture.batches(layout, config.training.seed, 1.0)
    assert len(fed[loop]) == 3
    for step, batch in enumerate(fed[loop]):
        equal(batch, separated_batches.batch(16 * step, 16 * step + 16))
    (validation,) = (dataset.validation for dataset in mixture.datasets.values())
    equal(fed[evaluation][0], rows_of(validation, layout).batch(np.arange(16)))


def test_a_resume_with_another_share_is_refused_and_an_old_config_has_none(config, tmp_path):
    values = config.model_dump(exclude_none=True)
    del values["data"]["prompt_separator"]
    old = parse_config(values, "config.toml")
    assert old.data.prompt_separator == 0.0
    run = RunFolder(str(tmp_path / "run"))
    check_same_config(old, changed(config, data__prompt_separator=0.0), run, ())
    with pytest.raises(UserError, match=r"data\.prompt_separator is 0\.1 but the run has 0\.0") as error:
        check_same_config(old, changed(config, data__prompt_separator=0.1), run, ())
    assert error.value.exit_code == ExitCode.CONFIG


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "0.5", True])
def test_a_share_that_is_none_is_refused(config, share):
    with pytest.raises(UserError, match=r"data\.prompt_separator"):
        changed(config, data__prompt_separator=share)
