"""Two real processes on this machine, joined into one program."""

import json
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from support.configs import changed
from support.two_processes import ended, start

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.errors import ExitCode
from gpt2_flax.training import loop

pytestmark = pytest.mark.multiprocess


def wait_until(true, processes):
    """Wait until a condition holds while both processes train."""
    patience = time.monotonic() + 120
    while not true() and all(process.poll() is None for process in processes):
        assert time.monotonic() < patience
        time.sleep(0.1)


def logged(config):
    """Return the last logged loss of each step; steps are repeated after a restart."""
    path = RunFolder(config.output).metrics
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.slow
def test_two_processes_stop_together_resume_and_give_the_losses_of_one(config, tmp_path):
    seldom = {"training__evaluate_every": 1000, "training__save_every": 1000}
    same_rate = {"optimizer__schedule": "constant", "optimizer__learning_rate": 1e-3}  # for every total_steps
    prompts = {"training__prompts": ["这是", "大鸟", ""]}
    config = changed(config, output=str(tmp_path / "two"), model__resid_pdrop=0.1, **seldom, **same_rate, **prompts)
    copy = shutil.copytree(config.data.dataset, tmp_path / "on the disk of another host")
    processes = start(changed(config, training__total_steps=2000), tmp_path, of_1=[f"data.dataset={copy}"])
    wait_until(lambda: max(logged(config), default=0) > 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errors = ended(processes)
    assert codes == [ExitCode.TRY_AGAIN] * 2, errors
    step = max(logged(config))
    for error in errors:
        assert f"\nstopped at step {step}, saved: " in f"\n{error}"

    config = changed(config, training__total_steps=step + 3)
    codes, outputs, errors = ended(start(config, tmp_path, "--allow-change", "training.total_steps"))
    assert codes == [0, 0], errors
    assert f"resumed from step {step}" in outputs[0]
    assert "step" not in outputs[1]  # only process 0 prints
    samples = RunFolder(config.output).samples.read_text(encoding="utf-8").splitlines()
    assert [line.split()[1] for line in samples] == [str(step + 3)] * 3

    alone = changed(config, output=str(tmp_path / "one"))
    loop.train(alone)
    two, one = logged(config), logged(alone)
    assert sorted(two) == sorted(one) == list(range(1, step + 4))
    np.testing.assert_allclose([two[step] for step in one], list(one.values()), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_when_one_is_killed_the_other_says_so_and_a_restart_gives_the_same_losses(config, tmp_path, capsys, killed):
    keys = {"optimizer__schedule": "constant", "training__evaluate_every": 1000, "training__keep_checkpoints": 2}
    config = changed(config, **keys, training__total_steps=3000, training__save_every=10)
    processes, run = start(config, tmp_path), RunFolder(config.output)
    wait_until(lambda: (run.checkpoints / "10").exists() and max(logged(config)) > 15, processes)
    processes[killed].kill()
    begun = time.monotonic()
    codes, _, errors = ended(processes)
    assert time.monotonic() - begun < 60
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == ExitCode.TRY_AGAIN, errors
    line = next(line for line in errors[1 - killed].splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: process {killed} (host {socket.gethostname()}, pid {processes[killed].pid})")
    assert f"of the run has ended: {run.path}; start the same command again" in line
    assert "a bug" not in errors[1 - killed]

    before = logged(config)
    config = changed(config, training__total_steps=max(before) + 1)
    loop.train(config, allow_change=["training.total_steps"])  # with another number of processes
    assert re.search(r"resumed from step \d+0\b", capsys.readouterr().out)
    after = logged(config)
    assert sorted(after) == list(range(1, max(before) + 2))
    np.testing.assert_allclose([after[step] for step in before], list(before.values()), rtol=1e-5)


def test_when_one_fails_the_other_says_why(config, tmp_path):
    begun = time.monotonic()
    codes, _, errors = ended(start(config, tmp_path, of_1=["data.dataset=/nowhere"]))
    assert time.monotonic() - begun < 100
    assert codes == [ExitCode.NO_INPUT] * 2, errors
    assert errors[1].splitlines()[-1].startswith("error: ")
    own = errors[1].splitlines()[-1].removeprefix("error: ")
    assert errors[0].splitlines()[-1].startswith("error: process 1 (host ")
    assert errors[0].splitlines()[-1].endswith(f" of the run has failed: gpt2-flax train; it says: {own}")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to"), [(signal.SIGINT, [0, 1]), (signal.SIGUSR1, [0])])
def test_both_stop_at_one_step_and_say_the_same(config, tmp_path, number, to):
    """Ctrl-C reaches all processes of a terminal; other signals may reach one, here process 0 with the hub."""
    processes = start(changed(config, training__total_steps=10**6, training__evaluate_every=10**6), tmp_path)
    wait_until(lambda: max(logged(config), default=0) > 3, processes)
    for process in to:
        processes[process].send_signal(number)
    codes, _, errors = ended(processes)
    assert codes == [ExitCode.TRY_AGAIN] * 2, errors
    run = RunFolder(config.output)
    sentence = f"stopped at step {run.last_checkpoint()}, saved: {run.path}; to go on: gpt2-flax train "
    assert [error.splitlines()[-1].partition("train ")[0] + "train " for error in errors] == [sentence] * 2
    assert not list(run.path.glob("crash-*"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_both_at_once(config, tmp_path):
    slow = (
        "import time; from gpt2_flax.checkpoint.store import CheckpointStore\n"
        "CheckpointStore.save = lambda *arguments: (print('saving', flush=True), time.sleep(1000))\n"
    )
    config = changed(config, training__save_every=10**6, training__total_steps=10**6, training__evaluate_every=10**6)
    processes = start(config, tmp_path, before=(slow, slow))
    wait_until(lambda: max(logged(config), default=0) > 3, processes)
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        assert "saving\n" in iter(process.stdout.readline, "")
    begun = time.monotonic()
    for process in processes:
        process.send_signal(signal.SIGINT)
    codes, _, errors = ended(processes)
    assert time.monotonic() - begun < 60
    assert codes == [ExitCode.INTERRUPTED] * 2
    for error in errors:
        assert error.splitlines()[-1].startswith("error: interrupted: gpt2-flax train, by Ctrl-C; ")
    assert not list(RunFolder(config.output).path.glob("crash-*"))


# JAX must be imported after the program has begun; otherwise the program exits without JAX's exit handlers.
LATER = """
from gpt2_flax import cpu
tune_cpu = cpu.tune_cpu
def change():
    tune_cpu()
{}
cpu.tune_cpu = change
"""
UNREADABLE = """
    from gpt2_flax.checkpoint import store
    read = store.read_meta
    def read_meta(folder, step):
        if step == 6:
            raise store.DamagedCheckpoint("its metadata cannot be read: here alone")
        return read(folder, step)
    store.read_meta = read_meta
"""
FULL_DISK = """
    import errno
    from orbax.checkpoint import AsyncCheckpointer
    save, wait, saved = AsyncCheckpointer.save, AsyncCheckpointer.wait_until_finished, []
    def begin(self, place, **keywords):
        save(self, place, **keywords)
        saved.append(place)
    def finish(self):
        wait(self)
        if len(saved) == 3:
            saved.append("failed")
            raise OSError(errno.ENOSPC, "No space left on device")
    AsyncCheckpointer.save, AsyncCheckpointer.wait_until_finished = begin, finish
"""


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_set_aside_by_both(config, tmp_path):
    """Also, each process reads init_from on its own device, while all devices form one mesh."""
    config = changed(config, training__save_every=3)
    loop.train(config)
    more = changed(config, training__total_steps=7)
    codes, outputs, errors = ended(
        start(more, tmp_path, "--allow-change", "training.total_steps", before=("", LATER.format(UNREADABLE)))
    )
    assert codes == [0, 0], errors
    run = RunFolder(config.output)
    moved = f"checkpoint 6 is damaged (its metadata cannot be read: here alone), moved to {run.path / 'damaged/6-0'}"
    assert f"warning: {moved}; using 3\n" in outputs[0]
    assert "resumed from step 3" in outputs[0]
    assert not re.search("warning|step", outputs[1])
    assert sorted(path.name for path in run.damaged.iterdir()) == ["6-0"]
    assert sorted(logged(config)) == list(range(1, 8))

    second = changed(config, output=str(tmp_path / "second"), init_from=config.output, training__total_steps=2)
    codes, outputs, errors = ended(start(second, tmp_path))
    assert codes == [0, 0], errors
    assert f"starting from {run.path} at step 7" in outputs[0]


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_fails_in_both_and_the_next_tries_again(config, tmp_path):
    config = changed(config, training__save_every=1)
    codes, outputs, errors = ended(start(config, tmp_path, before=("", LATER.format(FULL_DISK))))
    assert codes == [0, 0], errors
    (warning,) = re.findall(
        r"warning: checkpoint (\d) was not saved: disk full: .*its last checkpoint is (\d)", outputs[0]
    )
    assert int(warning[1]) <= int(warning[0]) < 6
    assert RunFolder(config.output).last_checkpoint() == 6
