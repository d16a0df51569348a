"""What a run shows on standard output: lines, and at a terminal a status below them."""

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.errors import naming_file
from gpt2_flax.progress import drawn_by
from gpt2_flax.training.throughput import Throughput


class Screen(AbstractContextManager):
    """Prints lines. `LiveScreen` also shows a status, for which all methods except `say` are.

    Args:
        quiet: print nothing but warnings, and show no bars.
    """

    def __init__(self, quiet: bool = False):
        self._quiet, self._stack = quiet, contextlib.ExitStack()
        self.memory: int | None = None
        """Peak bytes in use of a device, where the backend counts them."""

    def __enter__(self) -> "Screen":
        if self._quiet:
            self._stack.enter_context(drawn_by(self.doing))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def say(self, line: str) -> None:
        """Print a line."""
        if not self._quiet or "warning: " in line:
            with naming_file("standard output"):
                print(line, flush=True)

    def begin(self, name: str) -> None:
        """Begin a stage with a name such as "stage 1 of 2: ", which is empty for the only stage."""

    def doing(self, what: str, total: float | None = None) -> AbstractContextManager[Callable[..., None]]:
        """Show what the run does within the context, which yields `advance(amount)`."""
        return contextlib.nullcontext(lambda amount=1.0: None)

    def compiling(self, step: int, config: ResolvedConfig, throughput: Throughput) -> None:
        """Show that the step after `step` is compiled, until it has finished."""

    def stepped(self, step: int, loss: float) -> None:
        """Note the loss of a step that has finished."""


def open_screen(quiet: bool, live: bool) -> Screen:
    """Return the screen of a run.

    Args:
        quiet: print nothing but warnings.
        live: show a status, if standard output is a terminal that can.
    """
    if live and not quiet and sys.stdout.isatty():
        from gpt2_flax.training.live_screen import LiveScreen, can_show  # here, because most runs have no terminal

        if can_show():
            return LiveScreen()
    return Screen(quiet)
