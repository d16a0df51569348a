"""`train --max-hours` stops early enough for the save, by what steps, evaluations and saves have taken so far."""

import math
import re

import pytest
from support.configs import changed

from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.config.parse import dump_config
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.processes.phases import Phases
from gpt2_flax.processes.watchdog import Watchdog
from gpt2_flax.training import loop
from gpt2_flax.training.signals import StopRequest

STEP, BATCH, BEGIN_SAVE, WHOLE_SAVE = 10.0, 8.0, 5.0, 100.0


@pytest.fixture
def dog(monkeypatch):
    """A watchdog whose clock is turned by what the run does, and by nothing else."""
    dog = Watchdog()
    dog.now, dog.finished, pending = 0.0, {}, {}
    dog.phases = Phases(lambda: dog.now)
    make, progress, save, seal = loop.make_train_step, Phases.progress, CheckpointStore.save, CheckpointStore.seal

    def make_train_step(*arguments):
        step = make(*arguments)

        def timed(*state_and_batch):
            dog.now += STEP
            return step(*state_and_batch)

        return timed

    def timed_progress(self):
        if "evaluation" in self.name:
            dog.now += BATCH
        progress(self)

    def timed_save(self, step, *arguments):
        save(self, step, *arguments)
        pending[step] = dog.now + WHOLE_SAVE  # in the background
        dog.now += BEGIN_SAVE

    def timed_seal(self, *arguments, **keywords):
        if pending:
            step, end = pending.popitem()
            dog.now = max(dog.now, end)
            dog.finished[step] = dog.now
        return seal(self, *arguments, **keywords)

    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    monkeypatch.setattr(Phases, "progress", timed_progress)
    monkeypatch.setattr(CheckpointStore, "save", timed_save)
    monkeypatch.setattr(CheckpointStore, "seal", timed_seal)
    return dog


@pytest.mark.slow
@pytest.mark.parametrize(("deadline", "every", "evaluations"), [(900.0, 10**6, 1), (985.0, 12, 6)])
def test_the_last_save_is_finished_in_time_and_little_time_is_lost(config, dog, deadline, every, evaluations):
    keys = {"training__save_every": 12, "training__evaluate_every": every, "training__evaluation_batches": evaluations}
    with pytest.raises(UserError, match=r"stopped at step \d+, saved") as stopped:
        loop.train(changed(config, **keys, training__total_steps=1000), watchdog=dog, deadline=deadline)
    assert stopped.value.exit_code == ExitCode.TRY_AGAIN
    last = max(dog.finished)
    assert f"stopped at step {last}, saved" in str(stopped.value)
    assert last > 24  # two periodic saves, only the first of which was waited for
    evaluation = (evaluations + 1) * BATCH if every < 1000 else 0.0
    most = 2 * STEP + evaluation + 3 * WHOLE_SAVE  # one that is under way, one that is due, and the last
    assert deadline - 1.25 * most - 5.0 - STEP < dog.finished[last] <= deadline


@pytest.mark.slow
def test_the_last_step_is_left_to_the_next_start_when_its_evaluation_does_not_fit(config, dog):
    keys = {"training__evaluate_every": 4, "training__save_every": 4, "training__evaluation_batches": 2}
    config = changed(config, **keys, training__total_steps=10)
    with pytest.raises(UserError, match="stopped at step 9, saved"):
        # Step 9 is dispatched at 243 s, the save of step 8 has 85 s left: 205 s for that, two steps and a save are
        # there, with a quarter more and 5 s; 24 s for the evaluation are not.
        loop.train(config, watchdog=dog, deadline=520.0)
    assert dog.finished[9] == 243 + 85 + 100
    loop.train(config, watchdog=dog)
    assert RunFolder(config.output).last_checkpoint() == 10


def asks(longest, number=0, deadline=1000.0, now=0.0):
    dog = Watchdog()
    dog.number, dog.phases = number, Phases(lambda: now)
    dog.phases.longest = lambda kind: longest.get(kind, 0.0)
    return StopRequest(dog, deadline)


@pytest.mark.slow
@pytest.mark.parametrize(("ahead", "seconds"), [((), 110), (("step",), 120), (("step", "evaluation"), 150)])
def test_what_is_ahead_the_step_under_way_and_a_save_must_fit(ahead, seconds):
    """With a quarter more than the longest so far, and five seconds."""
    longest = {"step": 10.0, "evaluation": 30.0, "save": 100.0}
    latest = 1000 - 1.25 * seconds - 5
    for now, stops in ((latest - 1e-6, False), (latest + 1e-6, True)):
        with asks(longest, now=now) as ask:
            assert ask(*ahead) == stops


@pytest.mark.slow
def test_until_a_save_was_measured_it_is_guessed_by_size():
    with asks({"step": 1.0}, now=900.0) as ask:
        assert not ask("step")
        ask.first_save = 80.0
        assert ask("step")


@pytest.mark.slow
def test_only_the_clock_of_process_0_counts():
    with asks({}, number=1, now=1e9) as ask:
        assert not ask("step")


@pytest.mark.slow
def test_only_a_run_with_a_deadline_waits_for_its_first_save():
    assert asks({}).measures_save
    assert not asks({"save": 1.0}).measures_save
    assert not asks({}, deadline=math.inf).measures_save


@pytest.mark.slow
def test_the_command_stops_with_75_and_goes_on(config, tmp_path, capsys):
    config = changed(config, training__total_steps=10**6, training__save_every=10**6, training__evaluate_every=10**6)
    (tmp_path / "config.toml").write_text(dump_config(config), encoding="utf-8")
    resumed = 0
    for hours in ("0.0000001", "0.0016"):  # over before the first step; some steps later, where they are quick
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", str(tmp_path / "config.toml"), "--max-hours", hours])
        out, err = capsys.readouterr()
        assert ended.value.code == ExitCode.TRY_AGAIN
        command = rf"gpt2-flax train {tmp_path}/config\.toml --max-hours {hours}"
        step = int(re.fullmatch(rf"stopped at step (\d+), saved: {config.output}; to go on: {command}\n", err)[1])
        assert step == RunFolder(config.output).last_checkpoint()
        assert f"resumed from step {resumed}" in out or not resumed
        assert step > resumed
        resumed = step


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "soon"])
def test_hours_are_above_zero(config, tmp_path, capsys, hours):
    (tmp_path / "config.toml").write_text(dump_config(config), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(tmp_path / "config.toml"), "--max-hours", hours])
    assert ended.value.code == ExitCode.USAGE
    assert re.fullmatch(r"error: Invalid value for '--max-hours': .*; see `.*`\n", capsys.readouterr().err)
