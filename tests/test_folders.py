"""What a killed process left beside its output is removed by the next one, and nothing that is in use."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile

import pytest

from gpt2_flax.errors import UserError
from gpt2_flax.folders import new_folder, scratch_folder

# Fills a folder, says so, and waits for a line before it ends the block.
FILLING = """
import sys
from pathlib import Path
from gpt2_flax.folders import new_folder, scratch_folder
with new_folder(Path(sys.argv[1]), "marker") as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "weights").write_bytes(b"x" * 100_000)
    (folder / "marker").write_text("theirs")
    print("filled", flush=True)
    sys.stdin.readline()
"""


def filling(output) -> subprocess.Popen:
    command = [sys.executable, "-c", FILLING, str(output)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "filled\n"
    return process


def fill(output) -> None:
    with new_folder(output, "marker") as folder:
        (folder / "marker").write_text("ours")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["out", "an [odd] *name.v1"])
def test_the_folder_of_a_killed_process_is_removed_by_the_next_one(tmp_path, name):
    (tmp_path / ".bystander.tmp-1").mkdir()
    for _ in range(2):
        with filling(tmp_path / name) as process:
            process.kill()
    assert "weights" in names(tmp_path), "kill -9 leaves it, or this test is worth nothing"
    fill(tmp_path / name)
    assert names(tmp_path) == sorted([".bystander.tmp-1", name, "marker"])


@pytest.mark.multiprocess
def test_the_folder_of_a_living_process_is_left_alone(tmp_path):
    with filling(tmp_path / "out") as process:
        before = set(names(tmp_path))
        fill(tmp_path / "out")
        assert set(names(tmp_path)) == before | {"out"}
        _, said = process.communicate("go on\n", timeout=60)
    assert "UserError: output folder exists" in said
    assert names(tmp_path) == ["marker", "out"]
    assert (tmp_path / "out" / "marker").read_text() == "ours"


@pytest.mark.multiprocess
def test_where_nothing_can_be_locked_folders_are_made_and_none_is_removed(tmp_path, monkeypatch):
    with filling(tmp_path / "out") as process:
        process.kill()
    left = names(tmp_path)

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    fill(tmp_path / "out")
    assert names(tmp_path) == sorted([*left, "out", "marker"])
    with pytest.raises(UserError, match="output folder exists"):
        fill(tmp_path / "out")
    assert names(tmp_path) == sorted([*left, "out", "marker"])


SCRATCH = """
import sys
from gpt2_flax.folders import scratch_folder
with scratch_folder() as folder:
    (folder / "half a corpus").write_bytes(b"x" * 100_000)
    print("filled", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.multiprocess
def test_the_scratch_folder_of_a_killed_process_is_removed_by_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "gpt2-flax-crash-1.log").write_text("kept")
    (tmp_path / "gpt2-flax-bystander").mkdir()
    started = [
        subprocess.Popen([sys.executable, "-c", SCRATCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, living = started
    for process in started:
        assert process.stdout.readline() == "filled\n"
    with killed:
        killed.kill()
    assert names(tmp_path).count("half a corpus") == 2, "kill -9 leaves it, or this test is worth nothing"
    with scratch_folder() as folder:
        assert not any(folder.iterdir())
        assert folder.stat().st_mode & 0o777 == 0o700
        assert names(tmp_path).count("half a corpus") == 1  # of the living one
    with living:
        living.communicate("\n", timeout=60)
    assert names(tmp_path) == ["gpt2-flax-bystander", "gpt2-flax-crash-1.log"]


def test_a_lock_of_another_user_is_no_reason_to_remove_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "gpt2-flax-abc").mkdir()
    (tmp_path / "gpt2-flax-abc.lock").touch()
    other = os.getuid() + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: other)
        with scratch_folder():
            pass
    assert names(tmp_path) == ["gpt2-flax-abc", "gpt2-flax-abc.lock"]
    with scratch_folder():
        pass
    assert names(tmp_path) == []


# Ends by SIGTERM, sent just before the first call of a method of Path on a temporary folder.
STOPPED = """
import os, signal, sys, time
from pathlib import Path
from gpt2_flax.folders import new_folder
from gpt2_flax.interruption import catch_signals
catch_signals()
method = getattr(Path, sys.argv[2])
def stopped(path, *arguments, **options):
    if ".tmp-" in path.name:
        setattr(Path, sys.argv[2], method)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    return method(path, *arguments, **options)
setattr(Path, sys.argv[2], stopped)
with new_folder(Path(sys.argv[1]), "marker", overwrite=True) as folder:
    time.sleep(60 if sys.argv[2] == "mkdir" else 0)
    (folder / "marker").write_text("new")
time.sleep(60)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize(("method", "marker"), [("mkdir", "old"), ("rename", "new")])
def test_a_signal_while_a_folder_is_made_or_renamed_leaves_nothing_hidden(method, marker, replaces, tmp_path):
    output = tmp_path / "out"
    if replaces:
        output.mkdir()
        (output / "marker").write_text("old")
    command = [sys.executable, "-c", STOPPED, str(output), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 143
    assert "interrupted" in done.stderr
    if replaces or marker == "new":
        assert names(tmp_path) == ["marker", "out"]
        assert (output / "marker").read_text() == marker
    else:
        assert names(tmp_path) == []
