"""Requests to stop, by a signal or by `--max-hours`: the loop asks after each step, evaluated batch and stage."""

import math
from contextlib import AbstractContextManager, ExitStack

import jax

from gpt2_flax.interruption import FirstSignal
from gpt2_flax.processes.phases import Kind
from gpt2_flax.processes.watchdog import Watchdog

SLOW_DISK = 50e6  # bytes/s of each process: the assumed speed of a save until a save was measured
_MARGIN = 1.25  # a phase may take this many times its longest time so far,
_SPARE = 5.0  # and this many seconds more


class StopRequest(AbstractContextManager):
    """Whether a run must stop; all processes of a run stop at the same step.

    After the first question, the first signal requests a stop, and a second signal ends the process at once. Before the
    first question, a signal ends the process, as nothing was trained yet. Process 0 also requests a stop when the work
    ahead and the save after it may not end before `deadline`.
    """

    def __init__(self, watchdog: Watchdog, deadline: float = math.inf):
        self._watchdog, self._deadline = watchdog, deadline
        self._signal, self._stack = None, ExitStack()
        self.first_save = 0.0
        """Assumed seconds of a save, until a save was measured."""

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __call__(self, *ahead: Kind) -> bool:
        """Return whether to stop now.

        All processes must ask at the same moments; they get the same answers.

        Args:
            ahead: the phases before the next question.
        """
        if self._signal is None:
            self._signal = self._stack.enter_context(FirstSignal())
        return self._watchdog.stops(self._signal.number is not None or self._is_late(ahead))

    @property
    def measures_save(self) -> bool:
        """Whether to wait for the save under way, because its time must be known."""
        return self._deadline < math.inf and not self._watchdog.phases.longest("save")

    def _is_late(self, ahead: tuple[Kind, ...]) -> bool:
        if self._deadline == math.inf or self._watchdog.number != 0:
            return False
        phases = self._watchdog.phases
        steps = 3 if jax.process_count() > 1 else 1  # the step under way, and two more until all processes agree
        saving = phases.still_saving() + (phases.longest("save") or self.first_save)
        seconds = sum(map(phases.longest, ahead)) + steps * phases.longest("step") + saving
        return phases.clock() + _MARGIN * seconds + _SPARE > self._deadline
