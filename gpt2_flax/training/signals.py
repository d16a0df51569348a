"""SIGTERM and SIGINT as a question that the loop asks after each step, batch of an evaluation, and stage."""

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType

import jax
from jax.experimental import multihost_utils

from gpt2_flax.errors import ExitCode, UserError


class StopRequest(AbstractContextManager):
    """While the block runs, the first signal asks for a stop; a second one ends the process at once with 130.

    Of several processes all stop at one step: the coordination service of JAX tells them of SIGTERM.
    """

    def __enter__(self) -> "StopRequest":
        self._asked, self._several, self._calls = False, jax.process_count() > 1, 0
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            # With several processes SIGTERM is the coordination service's: a handler of ours would disable it.
            signals = (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT)
            self._previous = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Returns whether to stop now. All processes ask at the same moments, and get the same answers."""
        self._calls += 1
        if self._several and not self._asked:
            self._asked = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked or self._several:
            raise UserError(ExitCode.INTERRUPTED, "interrupted", "training", "the newest checkpoint is kept")
        self._asked = True
