"""Runs that end because their validation loss improves no more: at the same step however often they were stopped."""

import itertools
import json
import math
import re
import signal

import pytest
from support.configs import changed

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.errors import UserError
from gpt2_flax.model.loss import LossSums
from gpt2_flax.training import loop, validation
from gpt2_flax.training.policy import Best

LOSSES = [3.0, 2.0, 2.5, math.nan, 2.0, 1.0, 9.0, 9.0, 9.0, 9.0]  # of evaluations at steps 1, 2, ...


def test_the_best_is_the_first_of_the_lowest_and_never_what_is_not_finite():
    found = list(itertools.accumulate(enumerate(LOSSES, 1), lambda best, new: best.after(*new), initial=Best()))[1:]
    assert [best.loss for best in found] == [3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [best.step for best in found] == [1, 2, 2, 2, 2, 6, 6, 6, 6, 6]
    assert [best.since for best in found] == [0, 0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert [best.ends(3) for best in found].index(True) == 4
    assert not any(best.ends(0) for best in found)
    assert Best().after(1, math.inf) == Best(None, 0, 1)


@pytest.fixture
def config(config, monkeypatch):
    """Evaluations find LOSSES."""
    left = []

    def sums_of_batches(model, rows, mesh, n_rows, n_batches):
        yield LossSums(LOSSES[left[0] - 1], 1.0, 1)

    dispatched = loop.OneStepLate.dispatched

    def noting(self, step, *numbers):
        left[:] = [step]
        dispatched(self, step, *numbers)

    monkeypatch.setattr(validation, "sums_of_batches", sums_of_batches)
    monkeypatch.setattr(loop.OneStepLate, "dispatched", noting)
    keys = {"total_steps": 10, "evaluate_every": 1, "save_every": 2, "keep_checkpoints": 1}
    return changed(config, **{f"training__{key}": value for key, value in keys.items()})


def evaluated(config):
    records = [json.loads(line) for line in RunFolder(config.output).metrics.read_text().splitlines()]
    return sorted({record["step"] for record in records if "validation/loss" in record})


@pytest.mark.slow
def test_a_run_ends_when_its_validation_loss_does_not_improve(config, capsys):
    patient = changed(config, training__patience=3)
    loop.train(patient)
    out = capsys.readouterr().out
    sentence = "no lower validation loss in 3 evaluations, the best is 2.0000 at step 2"
    assert f"stopped at step 5, saved: {sentence}\n" in out
    assert evaluated(patient) == [1, 2, 3, 4, 5]
    assert sorted(int(path.name) for path in RunFolder(config.output).checkpoints.iterdir()) == [
        2,
        5,
    ]  # best and newest

    loop.train(patient)  # has ended
    assert f"{config.output} has ended: {sentence}\n" in capsys.readouterr().out
    assert evaluated(patient) == [1, 2, 3, 4, 5]
    loop.train(changed(config, training__patience=4))  # goes on, as if it had been so from the start
    assert re.search(r"stopped at step 10, saved|step +10 +validation", capsys.readouterr().out)
    assert evaluated(patient) == list(range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("stopped_at", [1, 2, 3, 4])
def test_a_run_that_was_stopped_ends_at_the_same_step(config, monkeypatch, capsys, stopped_at):
    config = changed(config, training__patience=3)
    ask, asked = loop.StopRequest.__call__, itertools.count(1)

    def stop(self, *ahead):
        if next(asked) == 2 * stopped_at:  # once after each step, once in its evaluation
            signal.raise_signal(signal.SIGTERM)
        return ask(self, *ahead)

    with monkeypatch.context() as patch:
        patch.setattr(loop.StopRequest, "__call__", stop)
        with pytest.raises(UserError, match=f"stopped at step {stopped_at}, saved"):
            loop.train(config)
    assert stopped_at not in evaluated(config)
    loop.train(config)
    assert (
        "stopped at step 5, saved: no lower validation loss in 3 evaluations, the best is 2.0"
        in capsys.readouterr().out
    )
    assert evaluated(config) == [1, 2, 3, 4, 5]
