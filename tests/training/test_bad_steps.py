"""Steps and runs that go wrong, and how a run goes on or stops."""

import itertools
import json
import shutil
import signal
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import changed
from support.one_device import step_and_state

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.parallel.device_batches import prefetch
from gpt2_flax.processes.watchdog import Watchdog
from gpt2_flax.training import loop
from gpt2_flax.training.metrics_log import MetricsLog
from gpt2_flax.training.open_stage import open_stage
from gpt2_flax.training.saving import Saver
from gpt2_flax.training.signals import StopRequest
from gpt2_flax.training.start import Progress
from gpt2_flax.training.step import all_finite

BAD = 1000  # added to the segment numbers of a batch whose loss or gradient shall not be finite
NOT_FINITE = {
    "loss": lambda loss, bad, _: loss * jnp.where(bad, jnp.nan, 1.0),
    "infinity": lambda loss, bad, _: loss + jnp.where(bad, jnp.inf, 0.0),
    # The root has no derivative at 0: the loss stays as it is.
    "gradient": lambda loss, bad, weight: loss + 0.0 * jnp.sqrt(jnp.where(bad, 0.0, 1.0) * weight**2),
}


@pytest.fixture
def bad_batches(monkeypatch):
    """Returns a function that says what goes wrong with batches made by `spoilt`."""
    real = GPT2.loss

    def use(kind):
        def loss(model, batch, *more):
            sums = real(model, batch, *more)
            bad, weight = batch.segments_BT.max() >= BAD, model.ln_f.scale[...][0]
            return sums._replace(nats=NOT_FINITE[kind](sums.nats, bad, weight))

        monkeypatch.setattr(GPT2, "loss", loss)

    return use


def spoilt(batch):
    return batch._replace(segments_BT=batch.segments_BT + BAD)


def spoil(monkeypatch, steps, first=1):
    """Spoils the batches of these steps of the next run, whose first step is `first`."""
    numbers, real = itertools.count(first), loop.device_batch

    def place(mesh, n_rows, read, start):
        if next(numbers) not in steps:
            return real(mesh, n_rows, read, start)
        return real(mesh, n_rows, lambda a, b: spoilt(read(a, b)), start)

    monkeypatch.setattr(loop, "device_batch", place)


def leaves(state):
    return [np.array(leaf) for leaf in jax.tree.leaves((state.model, state.opt_state))]


def equal(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def records(config):
    return [json.loads(line) for line in RunFolder(config.output).metrics.read_text().splitlines()]


def losses(config):
    """Loss and learning rate by step; the last line of a step counts."""
    lines = [record for record in records(config) if "train/loss" in record]
    return {line["step"]: (line["train/loss"], line["train/learning_rate"]) for line in lines}


def saved(config):
    return sorted(int(path.name) for path in RunFolder(config.output).checkpoints.iterdir() if path.name.isdecimal())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "parts"), [("loss", 1), ("infinity", 1), ("gradient", 1), ("gradient", 2)])
def test_a_bad_step_changes_nothing_and_the_next_goes_on_as_though_it_had_not_been(config, bad_batches, kind, parts):
    bad_batches(kind)
    step, start, (first, bad, last) = step_and_state(changed(config, training__accumulation_steps=parts), 3)
    state, _ = step(start(), first)
    before = leaves(state)
    state, metrics = step(state, spoilt(bad))
    assert equal(leaves(state), before)
    assert (int(state.step), int(state.skipped), int(metrics.skipped)) == (2, 1, 1)
    assert np.isfinite(float(metrics.loss)) == (kind == "gradient")
    assert not np.isfinite(float(metrics.loss) + float(metrics.grad_norm))
    state, after_bad = step(state, last)

    other, _ = step(start(), first)
    other, metrics = step(other, last)
    assert equal(leaves(state), leaves(other))
    assert float(after_bad.learning_rate) == float(metrics.learning_rate) > 0
    assert (int(state.step), int(state.skipped)) == (3, 1)


@pytest.mark.slow
def test_a_state_with_one_number_that_is_not_finite_is_not_saved(config):
    state, watchdog = step_and_state(config, 0)[1](), Watchdog()
    stage = open_stage(changed(config, output="run"), Mixture(config.data.datasets), [])
    saver = Saver(stage, None, MetricsLog(None), watchdog.phases, StopRequest(watchdog))
    assert bool(all_finite(state))
    for bad in (jnp.nan, -jnp.inf):
        spoilt_state = jax.tree.map(lambda leaf: leaf, state)
        scale = spoilt_state.model.ln_f.scale
        scale[...] = scale[...].at[-1].set(bad)
        assert not bool(all_finite(spoilt_state))
        with pytest.raises(UserError, match="parameters are not finite after step 6: run; lower") as error:
            saver.save(spoilt_state, Progress(step=6), skipped=0, figures={}, last=False, stopping=False)
        assert error.value.exit_code == ExitCode.DIVERGED


@pytest.mark.slow
def test_skipped_steps_are_named_counted_and_resumed_to_the_same_bits(
    config, tmp_path, monkeypatch, capsys, bad_batches
):
    bad_batches("loss")
    config = changed(config, model__resid_pdrop=0.1)
    with monkeypatch.context() as patch:
        spoil(patch, {2, 4})
        loop.train(config)
    out = capsys.readouterr().out
    assert "warning: step 2 skipped: loss nan; samples 16..31\n" in out
    assert "warning: step 4 skipped: loss nan; samples 48..63\n" in out
    assert [record["train/skipped_steps"] for record in records(config) if "train/loss" in record] == [0, 1, 1, 2, 2, 2]
    whole = losses(config)
    rates = [rate for _, rate in whole.values()]
    assert rates[1] == rates[2]  # the schedule waits with the optimizer
    assert [loss == "nan" for loss, _ in whole.values()] == [False, True, False, True, False, False]

    parts = changed(config, output=str(tmp_path / "parts"))
    ask, calls = loop.StopRequest.__call__, itertools.count(1)

    def stop_at_four(self, *ahead):
        if next(calls) == 5:  # the fourth was after the batch of the evaluation at step 3
            signal.raise_signal(signal.SIGTERM)
        return ask(self, *ahead)

    with monkeypatch.context() as patch:
        patch.setattr(loop.StopRequest, "__call__", stop_at_four)
        spoil(patch, {2, 4})
        with pytest.raises(UserError, match="stopped at step 4, saved"):
            loop.train(parts)
    loop.train(parts)
    assert losses(parts) == whole
    assert [record for record in records(parts) if "train/loss" in record][-1]["train/skipped_steps"] == 2


@pytest.mark.slow
def test_a_run_ends_after_too_many_skipped_steps_in_a_row_and_keeps_what_was_good(config, monkeypatch, bad_batches):
    bad_batches("gradient")
    config = changed(config, training__total_steps=20, training__max_skipped_steps=3, training__save_every=1)
    spoil(monkeypatch, {2, 3, 5, 6, 7})
    with pytest.raises(UserError, match="gradient norm nan at step 7, skipped steps in a row: 3") as error:
        loop.train(config)
    assert error.value.exit_code == ExitCode.DIVERGED
    assert saved(config) == [1, 4]  # and none while steps were skipped


@pytest.mark.slow
def test_a_save_that_was_due_is_made_after_the_next_good_step(config, monkeypatch, bad_batches):
    bad_batches("loss")
    spoil(monkeypatch, {3, 4})
    loop.train(config)
    assert saved(config) == [5, 6]


@pytest.mark.slow
def test_a_killed_run_says_how_many_steps_are_repeated_and_ends_the_line_it_was_writing(config, monkeypatch, capsys):
    calls = itertools.count(1)

    def die(self, *ahead):
        if next(calls) == 7:  # at step 6; the fourth was after the batch of the evaluation at step 3
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop.StopRequest, "__call__", die)
        with pytest.raises(RuntimeError, match="killed"):
            loop.train(config)
    metrics = RunFolder(config.output).metrics
    assert RunFolder(config.output).last_step() == 5
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 99, "tim')
    assert RunFolder(config.output).last_step() == 5
    loop.train(config)
    assert f"resumed from step 3 of {config.output} (2 steps repeated)\n" in capsys.readouterr().out
    lines = metrics.read_text().splitlines()
    records = [json.loads(line) for line in lines if not line.endswith('"tim')]
    assert [record["step"] for record in records if "checkpoint" not in record][-4:] == [4, 5, 6, 6]
    assert [record["checkpoint"] for record in records if "checkpoint" in record] == [6]
    assert RunFolder(config.output).last_step() == 6


@pytest.mark.slow
def test_a_disk_too_small_for_the_checkpoints_is_refused_before_training(config, monkeypatch):
    loop.train(changed(config, training__total_steps=1))  # leaves one checkpoint
    monkeypatch.setattr(loop, "run_steps", lambda *arguments: None)
    more = changed(config, training__keep_checkpoints=2, training__keep_best=0)
    size = sum(array.nbytes for array in leaves(step_and_state(config, 0)[1]()))
    usage = namedtuple("usage", "total used free")
    for free, fits in ((2 * size - 1, False), (2 * size, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(0, 0, free))
        if fits:
            loop.train(more, allow_change=["training.total_steps"])
        else:
            with pytest.raises(UserError, match="B free on the disk but checkpoints need") as error:
                loop.train(more, allow_change=["training.total_steps"])
            assert error.value.exit_code == ExitCode.IO
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 5 * size - 1))
    with pytest.raises(UserError, match="free some space"):  # nothing there yet: three, the best, and one being written
        loop.train(changed(config, output=config.output + "-new"))


@pytest.mark.slow
def test_a_dataset_whose_ids_are_outside_its_vocabulary_is_refused_before_training(config, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(config.data.dataset, folder)
    info = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(info | {"vocab_size": 40, "sha256": None}))
    with pytest.raises(UserError, match="outside the vocabulary of 40") as error:
        loop.train(changed(config, data__dataset=str(folder)))
    assert error.value.exit_code == ExitCode.DATA
    assert not RunFolder(config.output).path.exists()


def test_batches_are_made_two_ahead_and_not_more():
    made = []
    items = prefetch(lambda item: made.append(item) or item, range(9))
    for number in range(3):
        assert next(items) == number
        assert max(made) <= number + 2
    items.close()
    assert len(made) <= 5
