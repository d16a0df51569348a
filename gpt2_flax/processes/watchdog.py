"""The watchdog of a process: it ends the process when the run hangs or another process fails, and says why.

Without it the other processes would wait in a collective for minutes, or JAX would abort them without a helpful
message. The hub decides (`peers`); each watchdog sends heartbeats to the hub and obeys it. In a run of one process
there is no hub, and the watchdog looks at its own process only.
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
from typing import TYPE_CHECKING, Any

from gpt2_flax.crash_log import CrashLog
from gpt2_flax.errors import ExitCode, UserError, io_error, printable
from gpt2_flax.memory import out_of_memory
from gpt2_flax.processes import messages
from gpt2_flax.processes.messages import error_of, receive, send
from gpt2_flax.processes.phases import AGAIN, Phases, hang

if TYPE_CHECKING:
    from gpt2_flax.processes.place import Place

UNWINDING = 5.0  # seconds in which the process at fault may end in its own way


class Watchdog(AbstractContextManager):
    """Watches this process within its context; `join` makes one for a run of several processes.

    Leaving the context waits for the other processes: either all leave together, or the run ends for all.
    """

    def __init__(self) -> None:
        self.number = 0
        """The number of this process; process 0 leads."""
        self.token = ""
        """A random text that only the processes of this start know; empty for one process."""
        self.phases = Phases()
        """The training loop reports each step, evaluation and save here."""
        self._connection: socket.socket | None = None
        self._sending = threading.Lock()
        self._hub, self._where = "process 0", "gpt2-flax train"
        self._failure: BaseException | None = None
        self._over, self._together = threading.Event(), True
        self._asking, self._answered = False, threading.Event()
        self._stopping = threading.Condition()
        self._calls, self._stop_asked, self._stop_at = 0, False, math.inf
        self._watching, self._log = False, None
        self._abort_handler: int | None = None

    @classmethod
    def join(cls, place: "Place", facts: Mapping[str, str]) -> "Watchdog":
        """Wait until all processes have come; return the watchdog. Raises `UserError` like `joining.join`."""
        from gpt2_flax.processes.joining import join  # here, because a run of one process needs no hub

        self = cls()
        self.number = place.number
        self._connection, self._hub, self.token = join(place, facts)
        self._abort_handler = _delay_abort()
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
        if self._together:
            _libc_signal(self._abort_handler)
            self._connection.close()
        elif self._failure:
            # Registered last, so it runs before JAX's own exit handler, which would wait for the other processes.
            atexit.register(_leave, exit_code_of(self._failure))
        return None

    def agree(self, facts: Mapping[str, str], patience: float = math.inf) -> None:
        """Compare facts with all other processes; wait until all have sent theirs.

        Args:
            facts: texts by name, which must be equal in all processes.
            patience: the most seconds between the facts of two processes.

        Raises:
            UserError: in all processes: CONFIG that names the first difference, or the error of a process that fails.
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
        """Return whether to stop now. When one process wants to stop, all stop at the same call of this method.

        All processes must call it at the same moments.
        """
        if not self._connection:
            return wanted
        if wanted and not self._stop_asked:
            self._send("stop")
        with self._stopping:  # after reporting its calls, this process waits until the hub has chosen the last call
            self._stopping.wait_for(lambda: not self._stop_asked or self._stop_at < math.inf)
            self._calls += 1
            return self._calls >= self._stop_at

    @contextlib.contextmanager
    def running(self, where: str) -> Iterator[None]:
        """Run a stage in the folder `where`. An exception is announced before the stack unwinds.

        Within the context of the watchdog, a bug becomes a `UserError` (BUG) that names the crash log in the folder.
        """
        self._where = where
        self.phases.start()
        with CrashLog(Path(where), self.number) if self._watching else contextlib.nullcontext() as self._log:
            try:
                yield
            except BaseException as error:
                is_bug = isinstance(error, Exception) and exit_code_of(error) == ExitCode.BUG
                failure = self._log.bug(error) if self._log and is_bug else error
                self.announce(failure)
                if failure is error:
                    raise
                raise failure from error
            finally:
                self.phases.end()

    def announce(self, error: BaseException) -> None:
        """Tell the hub that this process ends with `error`."""
        self._failure = error
        self._send("failed", code=exit_code_of(error), sentence=_sentence(error)[:2000])

    def _watch(self) -> None:
        """End this process, the only process of its run, when it hangs. Runs in a thread."""
        while not self._over.wait(messages.BEAT):
            waited, phases = self.phases.waited(), self.phases
            if waited > phases.limit:
                what = hang(phases.name, waited, phases.limit)
                return self._end(UserError(ExitCode.TRY_AGAIN, what, self._where, AGAIN), stacks=True)
        return None

    def _listen(self) -> None:
        """Send heartbeats and receive messages of the hub. Runs in a thread."""
        rest, heard, beaten = bytearray(), time.monotonic(), 0.0
        while self._connection:
            if time.monotonic() - beaten > messages.BEAT:
                beaten = time.monotonic()
                name, marks, limit = self.phases.name, self.phases.marks, self.phases.limit
                self._send("beat", phase=name, marks=marks, waited=self.phases.waited(), limit=limit)
            try:
                arrived = receive(self._connection, rest)
            except EOFError:
                return self._lost("ended")
            heard = time.monotonic() if arrived else heard
            if time.monotonic() - heard > messages.SILENCE:
                return self._lost(f"been silent for {messages.SILENCE:.0f} s", stacks=True)
            for message in arrived:
                match message["kind"]:
                    case "over":
                        return self._over.set()
                    case "agreed":
                        self._answered.set()
                    case "stop" | "stops":
                        self._agree_to_stop(message.get("at", math.inf))
                    case "verdict":
                        return self._end(error_of(message, self._where), message["number"], message["stacks"])
        return None

    def _agree_to_stop(self, at: float) -> None:
        with self._stopping:
            self._stop_asked, self._stop_at = True, at
            self._stopping.notify_all()
            if at == math.inf:
                self._send("asked", times=self._calls)

    def _lost(self, how: str, stacks: bool = False) -> None:
        error = UserError(ExitCode.TRY_AGAIN, f"{self._hub} of the run has {how}", self._where, AGAIN)
        self._end(error, stacks=stacks)

    def _end(self, verdict: UserError, number: int = 0, stacks: bool = False) -> None:
        """End this process, even if its main thread hangs; a process that unwinds or compares facts gets more time.

        Process `number` is at fault. `stacks` adds the stacks of all threads to the crash log.
        """
        error: BaseException = verdict
        # A process that has stopped as agreed, and saved, reports that, whatever happens to the others afterwards.
        if self._failure and (number == self.number or exit_code_of(self._failure) == ExitCode.TRY_AGAIN):
            error = self._failure
        else:
            error = self._logged(verdict, stacks)
            if not self._asking:
                _leave(exit_code_of(error), _line(error))
        self._failure, self._together = error, False
        self._over.set()
        self._answered.set()
        time.sleep(UNWINDING)
        if not isinstance(error, UserError):
            traceback.print_exception(error)
        _leave(exit_code_of(error), _line(error))

    def _logged(self, error: UserError, stacks: bool) -> UserError:
        """Add the stacks to the crash log, or remove a crash log that only followed from another process's end."""
        if self._log and not stacks:
            self._log.remove()
        elif self._log and not self._log.closed:
            self._log.add_stacks(str(error))
            fix = f"{error.fix}; the stacks of this process are in {self._log.path}"
            error = UserError(error.exit_code, error.what, error.where, fix)
        return error

    def _send(self, kind: str, **values: Any) -> None:
        if self._connection:
            with self._sending:  # two threads send messages
                send(self._connection, kind, **values)


@contextlib.contextmanager
def announced(place: "Place | None") -> Iterator[None]:
    """Report an error in the block to the other processes; the block runs before this process has joined them."""
    try:
        yield
    except Exception as error:
        if place:
            from gpt2_flax.processes.joining import say_goodbye

            say_goodbye(place, exit_code_of(error), _sentence(error))
        raise


def exit_code_of(error: BaseException) -> int:
    if failure := out_of_memory(error, "", ""):
        return failure.exit_code
    if isinstance(error, OSError):
        error = io_error(error, "")
    return getattr(error, "exit_code", ExitCode.BUG)


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {str(error)[:500]}".strip(": ")


def _line(error: BaseException) -> str:
    return f"{error.prefix if isinstance(error, UserError) else UserError.prefix}{printable(_sentence(error))}\n"


def _leave(code: int, line: str = "") -> None:
    """End the process at once, without exit handlers, which might wait for processes that are gone."""
    if line:
        os.write(2, line.encode(errors="backslashreplace"))
    else:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _delay_abort() -> int | None:
    """Let JAX's abort() sleep, so that the watchdog can speak first; return the previous handler of SIGABRT.

    When process 0 is gone, JAX calls abort() in a thread of its own at once, and no Python code can prevent it. The
    handler must be C code. It gets the number of the signal as its argument: sleep(6), as SIGABRT is 6.
    """
    return _libc_signal(ctypes.cast(ctypes.CDLL(None).sleep, ctypes.c_void_p).value)


def _libc_signal(handler: int | None) -> int | None:
    libc_signal = ctypes.CDLL(None).signal
    libc_signal.argtypes, libc_signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    return libc_signal(signal.SIGABRT, handler)
