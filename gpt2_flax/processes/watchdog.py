"""Ends a run that hangs, and all processes of a run when one of them has ended, failed or hangs, and says which.

Without it the others would wait in a collective for minutes, or be aborted by JAX without a word that helps.
How the processes talk is described in `messages`. `hub` decides; here each of them listens and obeys.
"""

import atexit
import contextlib
import ctypes
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from gpt2_flax.crash_log import CrashLog
from gpt2_flax.errors import ExitCode, UserError, io_error, printable
from gpt2_flax.memory import out_of_memory
from gpt2_flax.processes import peers
from gpt2_flax.processes.joining import error_of, join, say_goodbye
from gpt2_flax.processes.messages import receive, send
from gpt2_flax.processes.peers import AGAIN
from gpt2_flax.processes.phases import Phases, hang
from gpt2_flax.processes.place import Place

UNWINDING = 5.0  # seconds in which the process that is to blame may end in its own way


class Watchdog(AbstractContextManager):
    """As it is, belongs to a run of one process; `join` returns one of several. Only within its context it watches.

    Leaving the context waits for the other processes: all leave together, or the run ends for all.
    """

    def __init__(self) -> None:
        self.number = 0
        """Of this process; 0 leads."""
        self.token = ""
        """Which all processes of this start know, and no other start has."""
        self._connection: socket.socket | None = None
        self._sending = threading.Lock()
        self._hub, self._where = "process 0", "gpt2-flax train"
        self._failure: BaseException | None = None
        self._over, self._together = threading.Event(), True
        self._asking, self._answered = False, threading.Event()
        self._stopping = threading.Condition()
        self._calls, self._stop_asked, self._stop_at = 0, False, math.inf
        self.phases = Phases()
        """What this process is doing, which it says at each step, evaluation and save."""
        self._watching, self._log = False, None

    @classmethod
    def join(cls, place: Place, facts: Mapping[str, str]) -> "Watchdog":
        """Waits until all processes have come, and returns the watchdog. Raises `UserError`, see `joining.join`."""
        self = cls()
        self.number = place.number
        self._connection, self._hub, self.token = join(place, facts)
        self._abort = _delay_abort()
        threading.Thread(target=self._listen, name="watchdog", daemon=True).start()
        return self

    def __enter__(self) -> "Watchdog":
        self._watching = True
        if not self._connection:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._watching = False
        if not self._connection:
            return self._over.set()
        if error and not self._failure:
            self.announce(error)
        self._send("out")
        self._over.wait()
        if not self._together:  # the hub waits until this process is gone; JAX's own end, which would wait, comes after
            atexit.register(_leave, _exit_code(self._failure))
        else:
            _libc_signal(self._abort)
            self._connection.close()
        return None

    def agree(self, facts: Mapping[str, str], patience: float = math.inf) -> None:
        """Waits until all processes have sent their facts, which must not be apart by more than `patience` seconds.

        Raises `UserError` in all of them: CONFIG that names the first difference, or the error of one that fails.
        """
        if not self._connection:
            return
        self._asking = True
        self._send("facts", facts=facts, patience=patience)
        self._answered.wait()
        self._answered.clear()
        self._asking = False
        if self._failure:
            raise self._failure

    def stops(self, wanted: bool) -> bool:
        """Returns whether to stop now: when one process wants it, all do, at the same call of this method.

        All processes must call it at the same moments.
        """
        if not self._connection:
            return wanted
        if wanted and not self._stop_asked:
            self._send("stop")
        with self._stopping:  # what the others were told of this process holds until the hub has heard them all
            self._stopping.wait_for(lambda: not self._stop_asked or self._stop_at < math.inf)
            self._calls += 1
            return self._calls >= self._stop_at

    @contextlib.contextmanager
    def running(self, where: str) -> Iterator[None]:
        """A stage of the run in a folder. An exception is announced before anything is unwound.

        While it is watched, a bug becomes a `UserError` (BUG) that names the crash log in the folder.
        """
        self._where = where
        self.phases.start()
        with CrashLog(Path(where), self.number) if self._watching else contextlib.nullcontext() as self._log:
            try:
                yield
            except BaseException as error:
                is_bug = isinstance(error, Exception) and _exit_code(error) == ExitCode.BUG
                failure = self._log.bug(error) if self._log and is_bug else error
                self.announce(failure)
                if failure is error:
                    raise
                raise failure from error
            finally:
                self.phases.end()

    def announce(self, error: BaseException) -> None:
        """Lets the other processes know that this one ends with `error`."""
        self._failure = error
        if self._connection:
            self._send("failed", code=_exit_code(error), sentence=_sentence(error)[:2000])

    def _watch(self) -> None:
        """Ends this process, the only one of its run, when it hangs; a thread."""
        while not self._over.wait(peers.BEAT):
            waited, phases = self.phases.waited(), self.phases
            if waited > phases.limit:
                what = hang(phases.name, waited, phases.limit)
                return self._end(UserError(ExitCode.TRY_AGAIN, what, self._where, AGAIN), stacks=True)
        return None

    def _listen(self) -> None:
        """Beats, and waits for the hub's word; a thread."""
        rest, heard, beaten = bytearray(), time.monotonic(), 0.0
        while True:
            if time.monotonic() - beaten > peers.BEAT:
                beaten = time.monotonic()
                name, marks, limit = self.phases.name, self.phases.marks, self.phases.limit
                self._send("beat", phase=name, marks=marks, waited=self.phases.waited(), limit=limit)
            try:
                messages = receive(self._connection, rest)
            except EOFError:
                return self._lost("ended")
            heard = time.monotonic() if messages else heard
            if time.monotonic() - heard > peers.SILENCE:
                return self._lost(f"been silent for {peers.SILENCE:.0f} s", stacks=True)
            for message in messages:
                if message["kind"] == "over":
                    return self._over.set()
                if message["kind"] == "agreed":
                    self._answered.set()
                if message["kind"] in ("stop", "stops"):
                    self._agree_to_stop(message.get("at", math.inf))
                if message["kind"] == "verdict":
                    return self._end(error_of(message, self._where), message["number"], message["stacks"])

    def _agree_to_stop(self, at: float) -> None:
        with self._stopping:
            self._stop_asked, self._stop_at = True, at
            self._stopping.notify_all()
            if at == math.inf:
                self._send("asked", times=self._calls)

    def _lost(self, how: str, stacks: bool = False) -> None:
        error = UserError(ExitCode.TRY_AGAIN, f"{self._hub} of the run has {how}", self._where, AGAIN)
        self._end(error, stacks=stacks)

    def _end(self, error: UserError, number: int = 0, stacks: bool = False) -> None:
        """Ends this process, wherever its main thread hangs; one that is to blame, or only waits, may do so itself."""
        # One that has stopped as agreed, and saved, says so whatever happens to the others afterwards.
        if self._failure and (number == self.number or _exit_code(self._failure) == ExitCode.TRY_AGAIN):
            error = self._failure
        else:
            error = self._logged(error, stacks)
            if not self._asking:
                _leave(_exit_code(error), _sentence(error))
        self._failure, self._together = error, False
        self._over.set()
        self._answered.set()
        time.sleep(UNWINDING)
        if not isinstance(error, UserError):
            traceback.print_exception(error)
        _leave(_exit_code(error), _sentence(error))

    def _logged(self, error: UserError, stacks: bool) -> UserError:
        if self._log and not stacks:
            self._log.remove()  # what is in it followed from the end of another process, as JAX's abort does
        elif self._log and not self._log.closed:
            self._log.add_stacks(str(error))
            fix = f"{error.fix}; the stacks of this process are in {self._log.path}"
            error = UserError(error.exit_code, error.what, error.where, fix)
        return error

    def _send(self, kind: str, **values: Any) -> None:
        with self._sending:  # the beats come from a thread of their own
            send(self._connection, kind, **values)


@contextlib.contextmanager
def announced(place: Place | None) -> Iterator[None]:
    """Lets the other processes know of an error in the block, which comes before they meet."""
    try:
        yield
    except Exception as error:
        if place:
            say_goodbye(place, _exit_code(error), _sentence(error))
        raise


def _exit_code(error: BaseException) -> int:
    if failure := out_of_memory(error, "", ""):
        return failure.exit_code
    if isinstance(error, OSError):
        error = io_error(error, "")
    return getattr(error, "exit_code", ExitCode.BUG)


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error)[:500]}".strip(": ")


def _leave(code: int, sentence: str = "") -> None:
    """Ends the process at once: nothing of Python or JAX is asked, which might wait for processes that are gone."""
    if sentence:
        os.write(2, f"error: {printable(sentence)}\n".encode(errors="backslashreplace"))
    else:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _delay_abort() -> int | None:
    """Gives the watchdog the time to speak when JAX aborts; returns the handler that was there.

    The moment process 0 is gone JAX calls abort() from a thread of its own, which no Python code can hinder. The
    handler must be C code, and is called with the number of the signal: sleep(6), as SIGABRT is 6.
    """
    return _libc_signal(ctypes.cast(ctypes.CDLL(None).sleep, ctypes.c_void_p).value)


def _libc_signal(handler: int | None) -> int | None:
    libc_signal = ctypes.CDLL(None).signal
    libc_signal.argtypes, libc_signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return libc_signal(signal.SIGABRT, handler)
