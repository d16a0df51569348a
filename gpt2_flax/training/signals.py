"""Signals and the end of `--max-hours`, as a question that the loop asks after each step, evaluated batch and stage."""

import math
from contextlib import AbstractContextManager, ExitStack

import jax

from gpt2_flax.interruption import FirstSignal
from gpt2_flax.processes.phases import Kind
from gpt2_flax.processes.watchdog import Watchdog

SLOW_DISK = 50e6  # bytes a second, from each process; so long a save is taken to last until one was measured
_MARGIN = 1.25  # times as long as the longest so far, and
_SPARE = 5.0  # seconds


class StopRequest(AbstractContextManager):
    """From the first question on, the first signal asks for a stop; a second one ends the process at once.

    Before that a signal ends the process: nothing was trained that could be saved. A stop is also asked for when
    process 0 finds that what comes next, and the save after it, may not end before `deadline`. Of
    several processes all stop at one step.
    """

    def __init__(self, watchdog: Watchdog, deadline: float = math.inf):
        self._watchdog, self._deadline = watchdog, deadline
        self._signal, self._stack = None, ExitStack()
        self.first_save = 0.0
        """Seconds that a save is taken to last as long as none was measured."""

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __call__(self, *ahead: Kind) -> bool:
        """Returns whether to stop now; `ahead` is all that comes before the next question.

        All processes ask at the same moments, and get the same answers.
        """
        if self._signal is None:
            self._signal = self._stack.enter_context(FirstSignal())
        return self._watchdog.stops(self._signal.number is not None or self._is_late(ahead))

    @property
    def measures_save(self) -> bool:
        """Whether the save under way must be waited for, as its time must be known."""
        return self._deadline < math.inf and not self._watchdog.phases.longest("save")

    def _is_late(self, ahead: tuple[Kind, ...]) -> bool:
        if self._deadline == math.inf or self._watchdog.number != 0:
            return False
        phases = self._watchdog.phases
        steps = 3 if jax.process_count() > 1 else 1  # the one under way, and two more until all have agreed
        saving = phases.still_saving() + (phases.longest("save") or self.first_save)
        seconds = sum(map(phases.longest, ahead)) + steps * phases.longest("step") + saving
        return phases.clock() + _MARGIN * seconds + _SPARE > self._deadline
