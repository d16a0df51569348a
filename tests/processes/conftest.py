"""Watchdogs that wait for seconds only, and record how they would end their processes."""

import contextlib
import tempfile
import threading

import pytest

from gpt2_flax.processes import meeting, messages, peers, phases, watchdog
from gpt2_flax.processes.watchdog import Watchdog


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Lets the watchdogs wait for seconds at most, and touch nothing of the process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for crash logs of runs without a folder
    monkeypatch.setattr(messages, "BEAT", 0.05)
    monkeypatch.setattr(messages, "SILENCE", 1.0)
    monkeypatch.setattr(peers, "GRACE", 0.5)
    monkeypatch.setattr(peers, "CLOSING", 0.3)
    monkeypatch.setattr(meeting, "START", 5.0)
    monkeypatch.setattr(meeting, "LINGER", 0.3)
    monkeypatch.setattr(watchdog, "UNWINDING", 0.2)
    monkeypatch.setattr(phases, "LEAST_STEP", 1.0)
    monkeypatch.setattr(phases, "TIMES", 1)
    monkeypatch.setattr(watchdog, "_libc_signal", lambda handler: None)
    monkeypatch.setattr(watchdog.atexit, "register", lambda *arguments: None)


class Ended(BaseException):
    """Raised in a thread instead of ending the process."""


@pytest.fixture
def left(monkeypatch):
    """Record the exit code and the sentence of each process that would have ended, by its number."""
    said = {}

    def leave(code, line=""):
        assert not line or (line.endswith("\n") and line.startswith(("error: ", "stopped at ")))
        said[numbers[threading.current_thread()]] = (code, line.removeprefix("error: ").removesuffix("\n"))
        raise Ended

    numbers = {}

    def known(method):
        def run(self):
            numbers[threading.current_thread()] = self.number
            with contextlib.suppress(Ended):
                method(self)

        return run

    monkeypatch.setattr(watchdog, "_leave", leave)
    monkeypatch.setattr(Watchdog, "_listen", known(Watchdog._listen))
    monkeypatch.setattr(Watchdog, "_watch", known(Watchdog._watch))
    return said
