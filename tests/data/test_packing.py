"""What rows consist of, in each way of packing; tokens are numbers of their own, so that each says where it is from."""

import contextlib
import hashlib
import itertools
import os
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.configs import changed
from support.rows import batches_of, rows
from support.token_datasets import write_dataset

from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.checkpoint.weights import model_from_weights
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data import flat_files, row_index
from gpt2_flax.data.batches import Batches, rows_of
from gpt2_flax.data.best_fit import best_fit_decreasing
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.dataset_info import shard_paths
from gpt2_flax.data.flat_files import KEPT_BYTES
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import IGNORE, RowLayout
from gpt2_flax.data.prepare import prepare_text
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.inference.evaluate import evaluate_source
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.text.documents import DEFAULT_OPTIONS
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.training import loop

DATA = Path(__file__).parents[3] / "shared" / "data"
PACKINGS = ("stream", "best_fit", "document")
VOCAB_SIZE = 2**17
T = 8
LENGTHS = st.one_of(
    st.integers(1, 3 * T), st.sampled_from([1, 2, T - 1, T, T + 1, T + 2, 2 * T + 1, 50 * T, 50 * T + 1])
)
SHARDS = st.lists(st.lists(LENGTHS, max_size=8), min_size=1, max_size=3)


def numbered(shards):
    """Documents of these lengths whose tokens count on from 1."""
    count = itertools.count(1)
    return [[[next(count) for _ in range(length)] for length in lengths] for lengths in shards]


def split_of(folder, shards):
    return write_dataset(folder, VOCAB_SIZE, numbered(shards)).train


def whole_epoch(split, packing, seq_length=T, across=False):
    all_rows = rows(split, seq_length, packing, across)
    return all_rows.batch(np.arange(all_rows.n_rows))


def segments_of(batch):
    """(tokens, targets, positions) of each segment, row by row."""
    for tokens, targets, segments, positions in zip(*(field.tolist() for field in batch), strict=True):
        columns = range(len(tokens))
        for number, group in itertools.groupby(columns, key=lambda column: segments[column]):
            part = list(group)
            yield number, *([values[column] for column in part] for values in (tokens, targets, positions))


# All three


@settings(max_examples=80)
@given(shards=SHARDS, packing=st.sampled_from(["stream", "best_fit"]))
def test_every_token_but_the_first_of_a_document_is_a_target_once_an_epoch(tmp_path_factory, shards, packing):
    batch = whole_epoch(split_of(tmp_path_factory.mktemp("dataset"), shards), packing)
    targets = batch.targets_BT[batch.targets_BT != IGNORE]
    expected = [token for document in itertools.chain(*numbered(shards)) for token in document[1:]]
    assert sorted(targets.tolist()) == expected


@settings(max_examples=80)
@given(shards=SHARDS, packing=st.sampled_from(PACKINGS), seq_length=st.sampled_from([1, 2, T, 100]))
def test_segments_are_parts_of_one_document_numbered_in_the_row_with_positions_from_0(
    tmp_path_factory, shards, packing, seq_length
):
    split = split_of(tmp_path_factory.mktemp("dataset"), shards)
    batch = whole_epoch(split, packing, seq_length)
    assert {field.dtype for field in batch} == {np.dtype(np.int32)}
    assert {field.shape[1] for field in batch} == {seq_length}
    owner = {token: n for n, document in enumerate(itertools.chain(*numbered(shards))) for token in document}
    for number, tokens, targets, positions in segments_of(batch):
        assert positions == list(range(len(tokens)))
        if number == 0:
            assert set(tokens) == {0}
            assert set(targets) == {IGNORE}
            continue
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        assert len({owner[token] for token in tokens}) == 1
        assert targets[:-1] == tokens[1:]
        same_document = owner.get(tokens[-1] + 1) == owner[tokens[-1]]
        assert targets[-1] == (tokens[-1] + 1 if same_document else IGNORE)
    for row in batch.segments_BT.tolist():
        used = [number for number, _ in itertools.groupby(row)]
        assert used in ([*range(1, len(used) + 1)], [*range(1, len(used)), 0])


@settings(max_examples=30)
@given(
    shards=SHARDS,
    packing=st.sampled_from(PACKINGS),
    n_hosts=st.integers(1, 5),
    rows_a_host=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_hosts_read_all_rows_of_an_epoch_each_once(tmp_path_factory, shards, packing, n_hosts, rows_a_host, epoch):
    split = split_of(tmp_path_factory.mktemp("dataset"), shards)
    loader = batches_of(split, T, 5, packing)
    in_order = Counter(map(bytes, loader.rows[0].batch(np.arange(0, loader.rows[0].n_rows)).tokens_BT))
    seen = Counter()
    steps = -(-loader.rows[0].n_rows // (n_hosts * rows_a_host))
    for step, host in itertools.product(range(steps), range(n_hosts)):
        first = epoch * loader.rows[0].n_rows + (step * n_hosts + host) * rows_a_host
        last = min(first + rows_a_host, (epoch + 1) * loader.rows[0].n_rows)
        if first < last:
            seen.update(map(bytes, loader.batch(first, last).tokens_BT))
    assert seen == in_order


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_past_an_epoch_and_those_of_nothing_are_padding(tmp_path, packing):
    for number, shards in enumerate(([[5, 20, 3]], [[]], [])):
        loader = batches_of(split_of(tmp_path / str(number), shards), T, 0, packing)
        batch = loader.rows[0].batch(
            np.arange(loader.rows[0].n_rows if shards and shards[0] else 0, loader.rows[0].n_rows + 3)
        )
        assert not batch.segments_BT.any()
        assert not batch.tokens_BT.any()
        assert (batch.targets_BT == IGNORE).all()
        assert loader.batch(7, 7).tokens_BT.shape == loader.rows[0].batch(np.arange(4, 4)).targets_BT.shape == (0, T)
        assert len(loader.batch(0, 5).tokens_BT) == 5


@pytest.mark.parametrize("n_tokens", [50, 30000])
def test_orders_of_epochs_do_not_depend_on_where_a_batch_begins(tmp_path, n_tokens):
    loader, fresh = (batches_of(split_of(tmp_path, [[n_tokens]]), 1, 3) for _ in range(2))
    epochs = [
        loader.batch(n * loader.rows[0].n_rows, (n + 1) * loader.rows[0].n_rows).tokens_BT[:, 0].tolist()
        for n in range(3)
    ]
    assert all(sorted(epoch) == [*range(1, n_tokens)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    whole = [*itertools.chain(*epochs)]
    for first in (0, 49, 90, 8190, 16384, 29990, 29000):
        last = min(first + 9000, len(whole))
        assert fresh.batch(first, max(first, last)).tokens_BT[:, 0].tolist() == whole[first:last]


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_id_outside_the_vocabulary_is_refused(tmp_path, packing):
    dataset = write_dataset(tmp_path, 100, [[[2, 5, 3]]])
    (tmp_path / "train" / "tokens-00000.bin").write_bytes(np.array([2, 100, 3], "<u2").tobytes())
    with pytest.raises(UserError, match="token id 100 outside the vocabulary of 100"):
        batches_of(dataset.train, T, 0, packing).rows[0].batch(np.arange(0, 1))


# best_fit


def plain_best_fit(lengths, capacity):
    """The space left in each row."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        best = min((space for space in spaces if space >= length), default=None)
        if best is not None:
            spaces.remove(best)
        spaces.append((capacity if best is None else best) - length)
    return sorted(spaces)


@settings(max_examples=300)
@given(lengths=st.lists(st.integers(1, 20), max_size=60), capacity=st.integers(20, 30), dtype=st.sampled_from("HI"))
@example(lengths=[7, 7, 7, 7, 7, 3, 3, 3, 2], capacity=20, dtype="I")
def test_best_fit_decreasing_leaves_the_space_that_its_definition_does(lengths, capacity, dtype):
    rows = best_fit_decreasing(np.array(lengths, dtype), capacity)
    filled = np.bincount(rows, weights=lengths)
    assert sorted((capacity - filled).tolist()) == plain_best_fit(lengths, capacity)
    longest = [max((length, -n) for n, length in enumerate(lengths) if rows[n] == row) for row in range(len(filled))]
    assert [-number for _, number in longest] == sorted(-number for _, number in longest)


def test_rows_may_be_longer_than_16_bits_say():
    rows = best_fit_decreasing(np.array([70000, 30000, 65536, 1, 40000]), 70000)
    assert rows.tolist() == [0, 2, 1, 1, 2]


@settings(max_examples=80)
@given(shards=SHARDS)
def test_documents_are_cut_only_where_a_row_is_too_short_for_them(tmp_path_factory, shards):
    split = split_of(tmp_path_factory.mktemp("dataset"), shards)
    parts = sorted(tokens for number, tokens, *_ in segments_of(whole_epoch(split, "best_fit")) if number)
    expected = []
    for document in itertools.chain(*numbered(shards)):
        inputs = document[:-1]
        expected += [inputs[start : start + T] for start in range(0, len(inputs), T)]
    assert parts == expected


def test_what_is_planned_in_portions_covers_everything_too(tmp_path):
    shards = [[n % 37 + 1 for n in range(400)], [5000], [9] * 50]
    split = split_of(tmp_path, shards)
    with mock.patch.multiple(row_index, PIECE=7):
        whole = whole_epoch(split, "best_fit")
    names = {path.name: path.read_bytes() for path in (tmp_path / "packing").iterdir()}
    for path in (tmp_path / "packing").iterdir():
        path.unlink()
    np.testing.assert_array_equal(whole.tokens_BT, whole_epoch(split, "best_fit").tokens_BT)
    assert names == {path.name: path.read_bytes() for path in (tmp_path / "packing").iterdir()}

    for path in (tmp_path / "packing").iterdir():
        path.unlink()
    with mock.patch.multiple(row_index, PIECE=7, PORTION=50):
        batch = whole_epoch(split, "best_fit")
    expected = [token for document in itertools.chain(*numbered(shards)) for token in document[1:]]
    assert sorted(batch.targets_BT[batch.targets_BT != IGNORE].tolist()) == expected
    assert len(whole.tokens_BT) < len(batch.tokens_BT) < 1.1 * len(whole.tokens_BT)


# document


def rows_of_documents(documents, length):
    """(tokens, targets) of rows as UER-py makes them, with 0 for padding and -1 for its targets."""
    for document in documents:
        while document:
            row, document = document[: length + 1], document[length + 1 :]
            tokens, targets = row[:length], row[1:]
            yield tokens + [0] * (length - len(tokens)), targets + [-1] * (length - len(targets))


@settings(max_examples=80)
@given(shards=SHARDS, seq_length=st.sampled_from([1, 2, T]))
def test_rows_of_documents_are_those_of_the_published_layout(tmp_path_factory, shards, seq_length):
    batch = whole_epoch(split_of(tmp_path_factory.mktemp("dataset"), shards), "document", seq_length)
    expected = list(rows_of_documents(itertools.chain(*numbered(shards)), seq_length))
    if expected:
        assert batch.tokens_BT.tolist() == [tokens for tokens, _ in expected]
        assert batch.targets_BT.tolist() == [targets for _, targets in expected]
    assert (batch.segments_BT == (batch.tokens_BT != 0)).all()


# Plans


@pytest.fixture
def split(tmp_path):
    return split_of(tmp_path / "dataset", [[5, 9, 30, 2], [], [7, 1, 12]])


def files(split):
    return sorted(path for path in (split.folder / "packing").iterdir())


@pytest.mark.parametrize("packing", ["best_fit", "document"])
def test_a_plan_is_made_once_for_each_split_and_length(split, packing):
    first = whole_epoch(split, packing)
    os.utime(split.folder / "packing", (0, 0))
    again = whole_epoch(split, packing)
    for field, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(field, other)
    assert (split.folder / "packing").stat().st_mtime == 0  # no file was made
    assert len(files(split)) == 3
    whole_epoch(split, packing, T + 1)
    whole_epoch(TokenDataset(split.folder).validation, packing)
    assert len(files(split)) == 9
    assert all(path.name.startswith(("train-", "validation-")) for path in files(split))


def test_a_changed_dataset_is_planned_anew(split):
    whole_epoch(split, "best_fit")
    other = split_of(split.folder, [[5, 9, 30, 2], [], [7, 12, 1]])
    batch = whole_epoch(other, "best_fit")
    assert len(files(split)) == 6
    assert (batch.targets_BT != IGNORE).sum() == other.n_tokens - other.n_documents


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, KEPT_BYTES])
def test_a_damaged_plan_is_found_and_made_again(split, monkeypatch, capsys, kept):
    monkeypatch.setattr(flat_files, "KEPT_BYTES", kept)
    monkeypatch.setattr("os.fsync", lambda file: None)
    expected = whole_epoch(split, "best_fit").tokens_BT
    names = files(split)
    for path in names:
        content = path.read_bytes()
        flips = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in range(len(content))]
        for damaged in (b"", bytes(len(content)), content[:-1], content[:-12], content[:-24], content + b"x", *flips):
            path.write_bytes(damaged)
            np.testing.assert_array_equal(whole_epoch(split, "best_fit").tokens_BT, expected)
            assert "damaged plan of rows" in capsys.readouterr().err
            assert path.read_bytes() == content
        path.unlink()
        np.testing.assert_array_equal(whole_epoch(split, "best_fit").tokens_BT, expected)
        assert path.read_bytes() == content
    assert files(split) == names
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in names[:2]]
    assert names[2].read_text() == "".join(lines)


def test_a_plan_that_changes_while_it_is_in_use_is_refused_or_makes_no_difference(split, monkeypatch):
    monkeypatch.setattr(flat_files, "KEPT_BYTES", 0)
    rows = rows_of(split, RowLayout(T, "best_fit"))
    expected = rows.batch(np.arange(rows.n_rows)).tokens_BT
    for path in files(split)[:2]:
        content = path.read_bytes()
        for damaged in (content[:-8], bytes(len(content)), b"\xff" * len(content)):
            path.write_bytes(damaged)
            with contextlib.suppress(UserError):
                rows.batch(np.arange(rows.n_rows))
            with pytest.raises(UserError, match="changed while it was in use") as error:
                split.watch.check()
            assert (error.value.exit_code, error.value.where) == (ExitCode.DATA, str(path))
        path.write_bytes(content)
        split.watch.check()
        np.testing.assert_array_equal(rows.batch(np.arange(rows.n_rows)).tokens_BT, expected)
    shutil.rmtree(split.folder / "packing")  # which may be deleted at any time
    split.watch.check()
    np.testing.assert_array_equal(rows.batch(np.arange(rows.n_rows)).tokens_BT, expected)


def test_no_plan_is_made_of_damaged_document_starts(split):
    path = shard_paths(split.folder, "train", 0)[1]
    content = path.read_bytes()
    starts = np.frombuffer(content, "<u8").copy()
    starts[1] += 1  # still in order
    path.write_bytes(starts.tobytes())
    with pytest.raises(UserError, match="sha256 differs") as error:
        whole_epoch(split, "best_fit")
    assert error.value.where == str(path)
    assert files(split) == []


def test_the_plan_of_a_dataset_that_cannot_be_written_is_kept_in_the_cache(split, tmp_path, monkeypatch, capsys):
    (split.folder / "packing").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = whole_epoch(split, "best_fit").tokens_BT
    cached = tmp_path / "cache" / "gpt2_flax" / "packing"
    assert f"kept in {cached}" in capsys.readouterr().err
    os.utime(cached, (0, 0))
    np.testing.assert_array_equal(whole_epoch(split, "best_fit").tokens_BT, first)
    assert cached.stat().st_mtime == 0  # no file was made
    assert capsys.readouterr().err == ""

    monkeypatch.setenv("XDG_CACHE_HOME", str(split.folder / "packing"))
    with pytest.raises(UserError) as error:
        whole_epoch(split, "best_fit")
    assert error.value.exit_code in (ExitCode.IO, ExitCode.CANT_CREATE)


def test_whoever_plans_at_the_same_time_leaves_one_whole_plan(split, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing else can be written
    alone = whole_epoch(split, "best_fit").tokens_BT
    content = {path.name: path.read_bytes() for path in files(split)}
    for path in files(split):
        path.unlink()

    def after_another(*arguments):
        with mock.patch.object(row_index, "best_fit_decreasing", best_fit_decreasing):
            np.testing.assert_array_equal(whole_epoch(split, "best_fit").tokens_BT, alone)
        return best_fit_decreasing(*arguments)

    with mock.patch.object(row_index, "best_fit_decreasing", after_another):
        np.testing.assert_array_equal(whole_epoch(split, "best_fit").tokens_BT, alone)
    assert {path.name: path.read_bytes() for path in files(split)} == content


def test_a_plan_that_fails_leaves_nothing(split):
    with (
        mock.patch.object(row_index, "best_fit_decreasing", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        whole_epoch(split, "best_fit")
    assert files(split) == []


# What the model makes of them

MODEL = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0) | {
    "n_positions": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def model():
    # Large weights make attention matter.
    cfg = ModelConfig(vocab_size=1024, initializer_range=0.5, **MODEL)
    return GPT2(cfg, rngs=nnx.Rngs(0))


@jax.jit
def nats(model, batch):
    logits_BTV = model(batch.tokens_BT, batch.segments_BT, batch.positions_BT)
    labels_BT = jnp.maximum(batch.targets_BT, 0)[..., None]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), labels_BT, -1)[..., 0]


def losses(model, loader):
    """The loss of each target."""
    batch = loader.rows[0].batch(np.arange(0, loader.rows[0].n_rows))
    found = np.asarray(nats(model, batch))
    trained = batch.targets_BT != IGNORE
    return dict(zip(batch.targets_BT[trained].tolist(), found[trained].tolist(), strict=True))


@pytest.mark.slow
def test_the_losses_of_a_document_that_fits_in_a_row_are_the_same_however_it_is_packed(model, tmp_path):
    lengths = [5, 17, 1, 9, 33, 2, 30, 16, 40, 3, 100, 12, 32, 31, 6]
    split = split_of(tmp_path, [lengths[:7], lengths[7:]])
    by_packing = [losses(model, batches_of(split, 32, 0, packing)) for packing in PACKINGS]
    whole = 0
    stream_targets = 0
    for document in itertools.chain(*numbered([lengths[:7], lengths[7:]])):
        if len(document) > 33:
            continue
        whole += 1
        _, best_fit, document_rows = ([found[token] for token in document[1:]] for found in by_packing)
        np.testing.assert_allclose(best_fit, document_rows, rtol=1e-5, atol=1e-5)
        first, last = document[0] - 1, document[-1] - 1
        if first // 32 == (last - 1) // 32:  # no window of the stream ends inside
            stream_targets += len(document) - 1
            np.testing.assert_allclose([by_packing[0][t] for t in document[1:]], best_fit, rtol=1e-5, atol=1e-5)
    assert whole == 13
    assert stream_targets > 30


@pytest.mark.parametrize("packing", PACKINGS)
def test_across_documents_attention_and_positions_run_through_the_row_and_targets_stay(model, tmp_path, packing):
    split = split_of(tmp_path, [[5, 17, 1, 9, 33, 2, 30, 16]])
    apart, across = (batches_of(split, 32, 0, packing, flag) for flag in (False, True))
    one, other = (loader.rows[0].batch(np.arange(0, loader.rows[0].n_rows + 1)) for loader in (apart, across))
    np.testing.assert_array_equal(one.tokens_BT, other.tokens_BT)
    np.testing.assert_array_equal(one.targets_BT, other.targets_BT)
    np.testing.assert_array_equal(other.segments_BT, one.segments_BT > 0)
    assert (other.positions_BT == np.arange(32)).all()
    assert {field.dtype for field in other} == {np.dtype(np.int32)}
    assert (apart.batch(0, 3).segments_BT.max() > 1) == (packing != "document")
    assert across.batch(0, 3).segments_BT.max() == 1

    # A change of the first token of a row is seen by targets of later documents, but for padding.
    row = int(np.argmax(one.segments_BT.max(1)))
    second = one.segments_BT[row] >= 2
    for batch, sees in ((one, False), (other, True)):
        changed_tokens = batch.tokens_BT.copy()
        changed_tokens[row, 0] += 500
        moved = np.asarray(nats(model, batch) != nats(model, batch._replace(tokens_BT=changed_tokens)))[row]
        assert moved[second].any() == (sees and packing != "document")
        assert not moved[batch.segments_BT[row] == 0].any()


def test_a_mixture_of_one_dataset_is_packed_as_the_dataset_alone(split):
    for packing, across in itertools.product(PACKINGS, (False, True)):
        alone = batches_of(split, T, 4, packing, across).batch(3, 20)
        for mixed in (
            Batches([split], [Fraction(1)], RowLayout(T, packing, across), 4).batch(3, 20),
            Mixture({str(split.folder): 1.0}).batches(RowLayout(T, packing, across), 4).batch(3, 20),
        ):
            for field, other in zip(alone, mixed, strict=True):
                np.testing.assert_array_equal(field, other)


@pytest.mark.slow
def test_a_run_keeps_its_packing_and_its_evaluation_uses_it(config, tmp_path):
    config = changed(config, data__packing="best_fit", model__attend_across_documents=True, training__total_steps=3)
    loop.train(config, devices=jax.devices()[:2])
    for key, value in (("data__packing", "stream"), ("model__attend_across_documents", False)):
        with pytest.raises(UserError, match=key.replace("__", ".")) as error:
            loop.train(changed(config, **{key: value}))
        assert error.value.exit_code == ExitCode.CONFIG

    source = load_source(Path(config.output))
    found = evaluate_source(source, None, None, n_rows=16, n_batches=0, options=DEFAULT_OPTIONS)
    model = model_from_weights(source.model, source.weights)
    validation = TokenDataset(config.data.dataset).validation
    batch = whole_epoch(validation, "best_fit", 16, across=True)
    expected = np.asarray(nats(model, batch))[batch.targets_BT != IGNORE]
    assert found.tokens == len(expected)
    assert found.loss == pytest.approx(expected.mean(), rel=1e-5)
    apart = whole_epoch(validation, "best_fit", 16)
    assert abs(np.asarray(nats(model, apart))[batch.targets_BT != IGNORE].mean() - expected.mean()) > 1e-4


# A real corpus


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the sample of CLUECorpusSmall")
def test_rows_of_a_real_corpus(tmp_path):
    tokenizer = load_tokenizer(DATA / "google_zh_vocab.txt")
    split = prepare_text([str(DATA / "CLUECorpusSmall_sampled.txt")], tokenizer, tmp_path, DEFAULT_OPTIONS)
    figures = {}
    for packing, length in itertools.product(PACKINGS, (128, 1024)):
        batch = whole_epoch(split, packing, length)
        figures[packing, length] = len(batch.tokens_BT), (batch.segments_BT == 0).mean()
        if packing != "document":
            assert (batch.targets_BT != IGNORE).sum() == split.n_tokens - split.n_documents
    # UER-py makes 6,573 rows of 128: its tokenizer cuts words of up to 200 characters, where ours takes 100.
    assert figures["document", 128] == (6572, pytest.approx(0.217, abs=5e-4))
    assert figures["document", 1024] == (2716, pytest.approx(0.762, abs=5e-4))
    assert (figures["stream", 128][0], figures["stream", 1024][0]) == (5180, 648)
    assert figures["best_fit", 128][1] <= 0.01
    assert figures["best_fit", 1024][1] <= 0.01
