"""The status of a run at a terminal: its step, losses, speed, memory and end, and what it does just now.

The training loop only notes numbers that it has anyway. A thread draws them, twice a second.
"""

import contextlib
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gpt2_flax import interruption
from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.interruption import cleaned_up
from gpt2_flax.model.flops import flops_of_steps
from gpt2_flax.progress import drawn_by, duration, si
from gpt2_flax.training.screen import Screen
from gpt2_flax.training.throughput import Throughput

_PER_SECOND = 2  # how often the status is drawn
_STEPS = 50  # whose mean speed is shown
_LEVELS = "▁▂▃▄▅▆▇█"
_WIDTH = 16  # of the sparkline


def can_show() -> bool:
    """Return whether the terminal moves the cursor, so that a status can be drawn again in its place."""
    return Console().is_interactive


class LiveScreen(Screen):
    """Prints lines above a status of two lines, or of three when the run was asked to stop."""

    def __init__(self):
        super().__init__()
        self._console = Console(highlight=False)
        self._name, self._doing, self._steps = "", list[_Activity](), None
        self._live = _Status(
            self,
            console=self._console,
            refresh_per_second=_PER_SECOND,
            transient=True,
            redirect_stderr=sys.stderr.isatty(),
        )

    def __enter__(self) -> "LiveScreen":
        self._stack.enter_context(cleaned_up(self._live.stop))
        self._stack.enter_context(self._live)
        self._stack.enter_context(drawn_by(self.doing))
        self._console.show_cursor()  # a process that is killed cannot bring it back
        return self

    def __exit__(self, *exception: object) -> None:
        with self._live.while_there():
            self._stack.close()

    def say(self, line: str) -> None:
        with self._live.while_there():
            self._console.print(Text(line), soft_wrap=True)

    def begin(self, name: str) -> None:
        self._name, self._steps, self.memory = name, None, None

    @contextlib.contextmanager
    def doing(self, what: str, total: float | None = None) -> Iterator[Callable[..., None]]:
        activity = _Activity(what, total)
        self._doing.append(activity)  # of several threads, the newest is shown
        try:
            yield activity.advance
        finally:
            self._doing.remove(activity)
            if self._steps:
                self._steps.since = time.perf_counter()  # this time counts for no step

    def compiling(self, step: int, config: ResolvedConfig, throughput: Throughput) -> None:
        losses = self._steps.losses if self._steps and self._steps.config is config else _Losses()
        self._steps = _Steps(config, throughput, step, losses, _Activity("compiling the training step"))

    def stepped(self, step: int, loss: float) -> None:
        if self._steps:
            self._steps.add(step, loss)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Return the status of this moment, with room for the `^C` that a terminal writes behind it."""
        steps, doing = self._steps, self._doing[-1:]
        if steps and steps.compiling and not doing:
            doing = [steps.compiling]
        rows: list[RenderableType] = [Text(self._name.rstrip(": "), style="bold")] if self._name else []
        if steps:
            rows.append(steps.line())
        rows.append(doing[0].line() if doing else Text(steps.speed(self.memory) if steps else "starting"))
        if interruption.asked:
            rows.append(Text("stops after this step, and saves; a second signal ends it at once", style="yellow"))
        yield from console.render(Group(*rows), options.update_width(max(1, options.max_width - 3)))


class _Status(Live):
    """Shows nothing more when the terminal is gone: a run goes on, and saves when it is asked to stop."""

    _is_gone = False

    def refresh(self) -> None:
        if not self._is_gone:  # else the console would keep what it cannot write
            with self.while_there():
                super().refresh()

    @contextlib.contextmanager
    def while_there(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._is_gone = True


class _Activity:
    """Something that a run does, and since when."""

    def __init__(self, what: str, total: float | None = None):
        self._what, self._total, self._done, self._since = what, total, 0.0, time.perf_counter()

    def advance(self, amount: float = 1.0) -> None:
        self._done += amount

    def line(self) -> RenderableType:
        took = duration(time.perf_counter() - self._since)
        if not self._total:
            return Text(f"{self._what}  {took}")
        done = f"{si(self._done)}/{si(self._total)}"
        return _row(self._what, _bar(self._total, self._done), f"{done}  {took}")


class _Losses:
    """The course of the loss over the last half of the steps or more: the means of equal numbers of steps."""

    def __init__(self):
        self.last: float | None = None
        self._means: list[float] = []
        self._each, self._sum, self._count = 1, 0.0, 0

    def add(self, loss: float) -> None:
        self.last = loss
        if not math.isfinite(loss):
            return
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count == self._each:
            means = [*self._means, self._sum / self._count]
            self._sum, self._count = 0.0, 0
            if len(means) == 2 * _WIDTH:
                means = [(one + other) / 2 for one, other in zip(means[::2], means[1::2], strict=True)]
                self._each *= 2
            self._means = means  # at once, because another thread draws them

    def sparkline(self) -> str:
        means = self._means[-_WIDTH:]
        low, high = min(means, default=0.0), max(means, default=0.0)
        scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
        return "".join(_LEVELS[round((mean - low) * scale)] for mean in means)


@dataclass
class _Steps:
    """The steps of a stage since its program was compiled."""

    config: ResolvedConfig
    throughput: Throughput
    step: int
    losses: _Losses
    compiling: _Activity | None
    since: float = 0.0
    """When the step under way began."""
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_STEPS))

    def add(self, step: int, loss: float) -> None:
        now = time.perf_counter()
        self.losses.add(loss)
        if self.compiling is None:
            self.seconds.append(now - self.since)
        self.step, self.since, self.compiling = step, now, None

    def line(self) -> RenderableType:
        total, loss = self.config.training.total_steps, self.losses.last
        shown = "" if loss is None else f"loss {loss:.4f}"
        return _row(
            f"step {self.step:,}/{total:,}",
            _bar(total, self.step),
            f"{self.step / total:.0%}",
            Text(shown, style="bold"),
            Text(self.losses.sparkline(), style="cyan"),
        )

    def speed(self, memory: int | None) -> str:
        training, seconds, step = self.config.training, list(self.seconds), self.step
        parts = []
        if sum(seconds):
            tokens_per_second = len(seconds) * self.throughput.positions / sum(seconds)
            flops_per_second = flops_of_steps(self.config, step - len(seconds), step) / sum(seconds)
            parts.append(f"{si(tokens_per_second)} tokens/s")
            if self.throughput.peak_flops:
                parts.append(f"MFU {flops_per_second / self.throughput.peak_flops:.1%}")
            parts.append(f"ETA {duration(flops_of_steps(self.config, step, training.total_steps) / flops_per_second)}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        parts.append(f"memory {si(memory, 'B')}" if memory else f"host memory {si(peak, 'B')}")
        ahead = {"evaluation": training.evaluate_every, "save": training.save_every}
        nearest = [
            f"{what} {min((step // every + 1) * every, training.total_steps):,}" for what, every in ahead.items()
        ]
        return "  ".join([*parts, f"next {', '.join(nearest)}"])


def _bar(total: float, done: float) -> ProgressBar:
    return ProgressBar(total, done, complete_style="cyan", finished_style="cyan")


def _row(*cells: RenderableType) -> Table:
    """Return a line as wide as the terminal; bars fill what the texts leave."""
    row = Table.grid(padding=(0, 2), expand=True)
    for cell in cells:
        row.add_column(ratio=1 if isinstance(cell, ProgressBar) else None, no_wrap=True)
    row.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))
    return row
