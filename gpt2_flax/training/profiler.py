"""A trace of some steps for TensorBoard's profiler or XProf."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from gpt2_flax.training.step import StepMetrics

_STEPS_BEFORE = 2  # the first compiles, the second fills the pipeline


class Profiler(AbstractContextManager):
    """Traces `n_steps` steps of a run, from the third step of this process on, into `folder`/plugins/profile.

    Every process writes the trace of its own devices. A run that ends earlier leaves a shorter trace.
    """

    def __init__(self, n_steps: int, folder: Path, first_step: int, say: Callable[[str], None]):
        self._folder, self._say, self._tracing = folder, say, False
        self._before, self._last = first_step + _STEPS_BEFORE, first_step + _STEPS_BEFORE + n_steps
        self._wanted = n_steps > 0

    def __exit__(self, *exception: object) -> None:
        if self._tracing:
            self._tracing = False
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:  # training continues without a profile
                self._say(f"warning: no profile in {self._folder}: {str(error).splitlines()[0]}")
            else:
                self._say(f"profile written: tensorboard --logdir {self._folder} (package xprof shows it)")

    def after(self, step: int, metrics: StepMetrics) -> None:
        """Begin or end the trace after a step; wait for the devices only at these two steps."""
        if self._wanted and step in (self._before, self._last):
            jax.block_until_ready(metrics)
            if step == self._before:
                jax.profiler.start_trace(self._folder)
                self._tracing = True
            else:
                self.__exit__()
