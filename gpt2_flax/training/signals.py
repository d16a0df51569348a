"""SIGTERM, Ctrl-C and their like as a question that the loop asks after each step, batch of an evaluation, and stage."""

from contextlib import AbstractContextManager, ExitStack

from gpt2_flax.interruption import FirstSignal
from gpt2_flax.parallel.watchdog import Watchdog


class StopRequest(AbstractContextManager):
    """From the first question on, the first signal asks for a stop; a second one ends the process at once.

    Before that a signal ends the process: nothing was trained that could be saved. Of several processes all stop at one
    step, whichever got the signal.
    """

    def __init__(self, watchdog: Watchdog):
        self._watchdog, self._signal, self._stack = watchdog, None, ExitStack()

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __call__(self) -> bool:
        """Returns whether to stop now. All processes ask at the same moments, and get the same answers."""
        if self._signal is None:
            self._signal = self._stack.enter_context(FirstSignal())
        return self._watchdog.stops(self._signal.number is not None)
