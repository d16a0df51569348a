"""SIGTERM and SIGINT as a question that the loop asks after each step, batch of an evaluation, and stage."""

import signal
from contextlib import AbstractContextManager, ExitStack

import jax
from jax.experimental import multihost_utils

from gpt2_flax.interruption import FirstSignal


class StopRequest(AbstractContextManager):
    """From the first question on, the first signal asks for a stop; a second one ends the process at once.

    Before that a signal ends the process: nothing was trained that could be saved. Of several processes all stop at one
    step: the coordination service of JAX tells them of SIGTERM.
    """

    def __enter__(self) -> "StopRequest":
        self._stack, self._signal = ExitStack(), None
        self._asked, self._several, self._calls = False, jax.process_count() > 1, 0
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __call__(self) -> bool:
        """Returns whether to stop now. All processes ask at the same moments, and get the same answers."""
        self._calls += 1
        if self._signal is None:
            # With several processes SIGTERM is the coordination service's: a handler of ours would disable it.
            numbers = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
            self._signal = self._stack.enter_context(FirstSignal(numbers))
        if not self._several:
            return self._signal.number is not None
        self._signal.check()
        if not self._asked:
            self._asked = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._asked
