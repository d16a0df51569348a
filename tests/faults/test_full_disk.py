"""A disk fills while a run trains: no hang, no false report of a save, and the file and the step are named."""

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from support.configs import changed
from tensorboardX import record_writer

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config.parse import dump_config
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.training import loop, metrics_log, profiler, tensorboard

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


@contextlib.contextmanager
def a_small_disk(folder):
    """Yield a function that fills the disk."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], check=True)

    def fill():
        with contextlib.suppress(OSError), open(folder / "fill", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    try:
        yield fill
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def at_step(monkeypatch, step, happens):
    after = profiler.Profiler.after

    def calling(self, now, metrics):
        after(self, now, metrics)
        if now == step:
            happens()

    monkeypatch.setattr(profiler.Profiler, "after", calling)


def on_a_small_disk(config, folder, monkeypatch, step, signalled=False, **changes):
    """Train while the disk fills at a step; return the error."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder.mkdir()
    with a_small_disk(folder) as fill:

        def happens():
            patience = time.monotonic() + 60
            while not (folder / "run/checkpoints/3").exists():  # the checkpoint is written in the background
                assert time.monotonic() < patience
                time.sleep(0.01)
            fill()
            if signalled:
                signal.raise_signal(signal.SIGTERM)

        at_step(monkeypatch, step, happens)
        with pytest.raises(UserError) as error:
            loop.train(changed(config, output=str(folder / "run"), **changes))
        monkeypatch.undo()
        (folder / "fill").unlink()
        resumed = changed(config, output=str(folder / "run"), **changes)
        loop.train(resumed)  # as the error says
        lines = RunFolder(folder / "run").metrics.read_text().splitlines()
        steps = {json.loads(line)["step"] for line in lines if line.endswith("}")}
        assert 6 in steps
    return error.value


@pytest.mark.multiprocess
def test_a_disk_that_fills_ends_the_run_and_names_the_checkpoint_before(config, tmp_path, monkeypatch, capfd):
    error = on_a_small_disk(config, tmp_path / "disk", monkeypatch, 4)
    assert (error.exit_code, error.what) == (ExitCode.IO, "disk full")
    # Lines may or may not still fit in the last block of metrics.jsonl.
    assert re.fullmatch(r".*/disk/run/checkpoints/6", error.where)
    assert error.fix == "free some space and run the same command again: it resumes from step 3"
    out, err = capfd.readouterr()
    assert "resumed from step 3" in out
    assert "Traceback" not in err


@pytest.mark.multiprocess
def test_a_checkpoint_that_cannot_be_written_is_not_said_to_be_saved(config, tmp_path, monkeypatch, capfd):
    seldom = dict.fromkeys(("training__log_every", "training__evaluate_every"), 100)
    error = on_a_small_disk(config, tmp_path / "disk", monkeypatch, 4, signalled=True, **seldom)
    assert (error.exit_code, error.what) == (ExitCode.IO, "disk full")  # not 75, "saved"
    assert re.fullmatch(r".*/disk/run/checkpoints/4", error.where)
    assert error.fix == "free some space and run the same command again: it resumes from step 3"
    out, err = capfd.readouterr()
    assert "resumed from step 3" in out
    assert "Traceback" not in err


@pytest.mark.slow
def test_metrics_on_a_full_device_are_named_with_their_step(config, capsys):
    """The same for users who may not mount a file system."""
    run = RunFolder(config.output)
    run.create()
    run.metrics.symlink_to(FULL)
    (run.path / "lock").touch()
    with pytest.raises(UserError) as error:
        loop.train(config)
    assert error.value.exit_code == ExitCode.IO
    assert str(error.value) == f"disk full: {run.metrics} at step 1; free some space and run the same command again"
    out = capsys.readouterr().out
    assert out.count("warning: ") == 1
    assert f"warning: No space left on device: {run.metrics} at step 1; the run continues" in out
    assert run.last_checkpoint() == 6  # the run continued to its end


@pytest.mark.slow
def test_samples_on_a_full_device_are_named_with_their_step(config):
    run = RunFolder(config.output)
    run.create()
    run.samples.symlink_to(FULL)
    (run.path / "lock").touch()
    with pytest.raises(UserError) as error:
        loop.train(changed(config, training__prompts=["这"], training__sample_tokens=1, training__save_every=2))
    assert str(error.value) == f"disk full: {run.samples} at step 3; free some space and run the same command again"
    assert run.last_checkpoint() == 6


@pytest.mark.slow
def test_lines_that_a_full_disk_refused_are_written_once_there_is_space(config, monkeypatch, capsys):
    """All records, each once, although a write may be cut short."""
    full = []

    class Disk(io.FileIO):
        def write(self, data):
            if 2 < len(full) < 9:
                full.append(data)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            full.append(data)
            return super().write(bytes(data)[:20])

    monkeypatch.setattr(metrics_log, "open", lambda path, mode, buffering: Disk(path, "a+"), raising=False)
    loop.train(config)
    assert capsys.readouterr().out.count("warning: No space left on device: ") == 1
    lines = [json.loads(line) for line in RunFolder(config.output).metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["checkpoint"] for line in lines if "checkpoint" in line] == [3, 6]


@pytest.mark.slow
@pytest.mark.parametrize("flush_seconds", [30.0, -1.0, 1e9], ids=["at first", "always", "at the end"])
def test_a_run_goes_on_without_tensorboard_after_one_warning(config, capsys, monkeypatch, flush_seconds):
    monkeypatch.setattr(tensorboard, "FLUSH_SECONDS", flush_seconds)
    monkeypatch.setattr(record_writer, "open_file", lambda path: open(FULL, "wb"))  # noqa: SIM115
    loop.train(config)
    out = capsys.readouterr().out
    folder = RunFolder(config.output).tensorboard
    assert out.count("warning: ") == 1
    assert f"warning: no more events for TensorBoard (No space left on device): {folder}; the run continues\n" in out
    steps = [json.loads(line)["step"] for line in RunFolder(config.output).metrics.read_text().splitlines()]
    assert set(steps) == {1, 2, 3, 4, 5, 6}


@pytest.mark.slow
def test_a_folder_of_events_that_cannot_be_made_is_a_warning(config, capsys):
    run = RunFolder(config.output)
    run.create()
    (run.path / "lock").touch()
    run.tensorboard.touch()
    loop.train(config)
    assert "warning: no more events for TensorBoard (File exists)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_profile_that_cannot_be_written_is_a_warning(config, capsys, monkeypatch):
    def full():
        raise RuntimeError("UNKNOWN: No space left on device\nmore")

    stop = profiler.jax.profiler.stop_trace
    monkeypatch.setattr(profiler.jax.profiler, "stop_trace", lambda: (stop(), full()))
    loop.train(config, profile_steps=1)
    assert "warning: no profile in " in capsys.readouterr().out


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_limit_of_file_sizes_is_one_line(config, tmp_path):
    """Simulate a full disk in a real process: writing fails beyond 20 kB of a file."""
    (tmp_path / "config.toml").write_text(dump_config(changed(config, training__log_every=1)), encoding="utf-8")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from gpt2_flax.__main__ import main; main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""}
    command = [sys.executable, "-c", code, "train", str(tmp_path / "config.toml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (
        74,
        f"error: reading or writing failed: {config.output}/checkpoints/3; the system says: File too large: "
        "it starts from its beginning\n",
    )


FULL_DISK = {
    "at once": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "in the background": ValueError("RESOURCE_EXHAUSTED: write [os_error_code='28'] [source locations='a']\nof files"),
}


def failing_saves(monkeypatch, kind, steps):
    """Let the saves of `steps` fail as on a full disk, in `save` itself or in the background."""
    save, wait, broken = ocp.AsyncCheckpointer.save, ocp.AsyncCheckpointer.wait_until_finished, []

    def saving(self, place, **keywords):
        if int(place.name) not in steps:
            return save(self, place, **keywords)
        (place.parent / f"{place.name}.orbax-checkpoint-tmp").mkdir()
        if kind == "at once":
            raise FULL_DISK[kind]
        broken.append(FULL_DISK[kind])
        return None

    def waiting(self):
        wait(self)
        if broken:
            raise broken.pop()

    monkeypatch.setattr(ocp.AsyncCheckpointer, "save", saving)
    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", waiting)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL_DISK)
def test_a_save_that_fails_ends_that_save_and_not_the_run(config, monkeypatch, capsys, kind):
    """The next save tries again, and no checkpoint is deleted before a newer one exists."""
    keys = {"training__save_every": 1, "training__keep_checkpoints": 1, "training__keep_best": 0}
    failing_saves(monkeypatch, kind, {2, 3, 5})
    loop.train(changed(config, **keys))
    out, checkpoints = capsys.readouterr().out, RunFolder(config.output).checkpoints
    warnings = re.findall(
        r"warning: checkpoint (\d) was not saved: disk full: (\S+) \(\S+ \S*B needed, .*B free\); .*", out
    )
    assert warnings == [(str(step), str(checkpoints / str(step))) for step in (2, 3, 5)]
    assert re.findall(r"its last checkpoint is (\d)", out) == ["1", "1", "4"]
    assert [path.name for path in checkpoints.iterdir()] == ["6"]
    records = [json.loads(line) for line in RunFolder(config.output).metrics.read_text().splitlines()]
    assert [record["checkpoint"] for record in records if "checkpoint" in record] == [1, 4, 6]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL_DISK)
@pytest.mark.parametrize(("fails", "resumes"), [({1}, "it starts from its beginning"), ({6}, "it resumes from step 5")])
def test_the_last_save_and_the_first_must_succeed(config, monkeypatch, kind, fails, resumes):
    failing_saves(monkeypatch, kind, fails)
    with pytest.raises(UserError) as error:
        loop.train(changed(config, training__save_every=1))
    (step,) = fails
    where = RunFolder(config.output).checkpoints / str(step)
    assert error.value.exit_code == ExitCode.IO
    assert str(error.value) == f"disk full: {where}; free some space and run the same command again: {resumes}"
    monkeypatch.undo()
    loop.train(changed(config, training__save_every=1))
    assert RunFolder(config.output).last_checkpoint() == 6
