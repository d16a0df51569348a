"""Crash logs of real processes."""

import fcntl
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gpt2_flax.crash_log import CrashLog

HEAD = "import os, signal, sys, threading; from pathlib import Path; from gpt2_flax.crash_log import CrashLog\n"


def run(folder, body):
    """Run `body` within a crash log of process 3 in `folder`; return the ended process."""
    code = f"{HEAD}with CrashLog(Path({str(folder)!r}), 3):\n    {body}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE])
def test_a_fatal_signal_leaves_the_stacks_of_all_threads(tmp_path, number):
    body = f"threading.Thread(target=threading.Event().wait).start(); os.kill(os.getpid(), {number})"
    done = run(tmp_path, body)
    assert (done.returncode, done.stderr) == (-number, "")
    (log,) = tmp_path.iterdir()
    assert re.fullmatch(r"crash-\d{8}-\d{6}-3\.log", log.name)
    text = log.read_text(encoding="utf-8")
    assert text.startswith("Fatal Python error: ")
    assert re.search(r"^Thread 0x\w+ .*\n  File .* in wait$", text, re.MULTILINE)
    assert re.search(r"^Current thread 0x\w+ .*\n  File \"<string>\", line 3 in <module>$", text, re.MULTILINE)


@pytest.mark.multiprocess
def test_nothing_is_left_of_a_process_that_ends_well(tmp_path):
    done = run(tmp_path, f"print(*os.listdir({str(tmp_path)!r}))")
    assert re.fullmatch(r"crash-\d{8}-\d{6}-3\.log\n", done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.multiprocess
def test_empty_logs_of_killed_processes_are_removed_but_not_of_living_ones(tmp_path):
    assert run(tmp_path, "os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL
    (dead,) = tmp_path.iterdir()
    (tmp_path / "crash-20200101-000000-0.log").write_text("stacks")
    (tmp_path / "other.log").touch()
    with open(tmp_path / "crash-20200101-000000-1.log", "w") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        with CrashLog(tmp_path, 0) as log:
            kept = {"crash-20200101-000000-0.log", "other.log", "crash-20200101-000000-1.log"}
            assert {path.name for path in tmp_path.iterdir()} == kept | {log.path.name}
            with CrashLog(tmp_path, 1) as another:
                assert log.path.exists()
                assert another.path.exists()
    assert not dead.exists()
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("folder", [None, Path("/proc/no such folder")])
def test_without_a_folder_it_is_a_temporary_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with CrashLog(folder) as log:
        assert log.path.parent == tmp_path
        error = log.bug(ZeroDivisionError("零"))
    assert error.where == str(log.path)
    assert log.path.read_text(encoding="utf-8").endswith("ZeroDivisionError: 零\n")
