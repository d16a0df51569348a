"""Ctrl-C (SIGINT) and the other `SIGNALS` end the program with one line and an exit code, at any moment.

No signal handler raises an exception: imports, callbacks and destructors of libraries would swallow it or abort the
process. Instead, a thread reads each signal from a pipe, even while the main thread runs C code, and ends the process.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from gpt2_flax.errors import ExitCode, UserError

SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGTERM)
_END, _NOTE, _IGNORE = range(100, 103)  # how the thread reacts to signals; sent through the same pipe, so in order
_GRACE = 5.0  # seconds for each clean-up
_ONE = 0.2  # seconds; some launchers send one signal twice, to the process and to its group

_pipe: int | None = None  # the writing end; None outside the program
_ending = threading.Lock()  # taken by the thread that ends the process, and never released
clean_ups: list[Callable[[], object]] = []
asked: int | None = None
"""The signal that was noted within the block of a `FirstSignal`, at once, even while the main thread runs C code."""
_exit_code: int | None = None  # set when the command has finished


def catch_signals() -> None:
    """Let signals end this process with one line. Call this first, in the main thread."""
    global _pipe
    reading, _pipe = os.pipe()
    os.set_blocking(_pipe, False)
    atexit.register(_leave)  # registered first, so it runs last
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    signal.set_wakeup_fd(_pipe, warn_on_full_buffer=False)
    for number in SIGNALS:
        # A background job of a shell ignores SIGINT, but must end on it.
        if number in (signal.SIGINT, signal.SIGTERM) or number in _not_ignored():
            signal.signal(number, lambda number, frame: None)


def finish(exit_code: int) -> int:
    """Return `exit_code`, which the process exits with from now on; never return while a signal ends the process."""
    global _exit_code
    if _pipe is not None and _exit_code is None:
        _ending.acquire()
        _exit_code = exit_code
    return exit_code


def interrupted(number: int) -> UserError:
    """Return the error for a command that a signal has ended."""
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    code = ExitCode(128 + number)
    if command == "train" and number != signal.SIGINT:
        code = ExitCode.TRY_AGAIN  # job scripts start a stopped run again, whether it was saved or not
    where = f"gpt2-flax {command}, by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}"
    return UserError(code, "interrupted", where, "run the same command again: it starts over, or resumes where it can")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a signal end the process only after the block, which must be short.

    If the process is ending already, this thread waits here for ever, so that it does not use what is cleaned up.
    """
    with contextlib.nullcontext() if _exit_code is not None else _ending:
        yield


@contextlib.contextmanager
def cleaned_up(clean_up: Callable[[], object]) -> Iterator[None]:
    """Call `clean_up`, in another thread, if a signal ends the process within the block."""
    clean_ups.append(clean_up)
    try:
        yield
    finally:
        with uninterrupted():
            clean_ups.remove(clean_up)


@contextlib.contextmanager
def handled_by(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let `handler` handle all signals within the block."""
    _react(_IGNORE)
    previous = {number: signal.signal(number, handler) for number in _not_ignored()}
    try:
        yield
    finally:
        _restore(previous)
        _react(_END)


class FirstSignal(AbstractContextManager):
    """Within the block, the first signal is only noted; a second signal ends the process at once."""

    def __init__(self):
        self.number: int | None = None
        self._previous = {}

    def __enter__(self) -> "FirstSignal":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _not_ignored()}
            _react(_NOTE)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous:
            _react(_END)
            _restore(self._previous)

    def check(self) -> None:
        """Raise `UserError` if a signal has come."""
        if self.number is not None:
            raise interrupted(self.number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        _restore(self._previous)  # outside the program, a second signal has its former effect


def _not_ignored() -> list[int]:
    """Return the signals that this process does not ignore; nohup makes it ignore SIGHUP."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _restore(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _react(reaction: int) -> None:
    if _pipe is not None:
        os.write(_pipe, bytes([reaction]))


def _watch(reading: int) -> None:
    """Read signals and reactions from the pipe. Runs in a thread."""
    global asked
    reaction, noted = _END, 0.0
    while True:
        for byte in os.read(reading, 1):
            if byte in (_END, _NOTE, _IGNORE):
                reaction, noted, asked = byte, 0.0, None
            elif byte not in SIGNALS or reaction == _IGNORE:
                continue
            elif reaction == _NOTE and (not noted or time.monotonic() - noted < _ONE):
                noted, asked = noted or time.monotonic(), byte
            else:
                _end(reading, interrupted(byte))


def _end(reading: int, failure: UserError) -> None:
    """End the process; another signal shortens each wait."""
    if _wait(reading, lambda: _ending.acquire(blocking=False)):
        _attempt(reading, *reversed(clean_ups))
        _attempt(reading, sys.stdout.flush)
        _attempt(reading, lambda: os.write(2, f"error: {failure}\n".encode(errors="backslashreplace")))
    # Otherwise the command has finished, or has failed and said why, and hangs in an exit handler of a library.
    os._exit(failure.exit_code if _exit_code is None else _exit_code)


def _attempt(reading: int, *actions: Callable[[], object]) -> None:
    """Call actions that may block, or fail because the main thread does the same."""

    def call() -> None:
        for action in actions:
            with contextlib.suppress(Exception):
                action()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_ONE)
    _wait(reading, lambda: not thread.is_alive())


def _wait(reading: int, done: Callable[[], bool]) -> bool:
    patience = time.monotonic() + _GRACE
    while not (is_done := done()) and time.monotonic() < patience and not select.select([reading], [], [], 0.02)[0]:
        pass
    return is_done


def _leave() -> None:
    """Exit without the rest of the interpreter's shutdown, where signals kill and threads of libraries crash."""
    if _exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(_exit_code)
