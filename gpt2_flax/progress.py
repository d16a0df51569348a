"""Progress bars for people at a terminal; silence for everything else."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from gpt2_flax.interruption import cleaned_up


class RateColumn(ProgressColumn):
    """Units a second, with SI prefixes."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{si(speed, self.unit)}/s")


class OutputRateColumn(ProgressColumn):
    """Mean rate of what comes out."""

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{si(task.fields['output'] / task.elapsed, self.unit)}/s" if task.elapsed else "")


class _Bar(AbstractContextManager):
    def __init__(self, description: str, total: float | None, unit: str, output_unit: str | None):
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")]
        rates = [RateColumn(unit), *([OutputRateColumn(output_unit)] if output_unit else [])]
        self.progress = Progress(*columns, *rates, TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.progress.add_task(description, total=total, output=0.0)
        self.output = 0.0
        self.stack = ExitStack()

    def __enter__(self) -> Callable[..., None]:
        self.stack.enter_context(cleaned_up(self.progress.stop))  # it has hidden the cursor
        self.progress.start()
        return self._advance

    def _advance(self, amount: float, output: float = 0.0) -> None:
        self.output += output
        self.progress.update(self.task, advance=amount, output=self.output)

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()
        self.stack.close()


def progress_bar(
    description: str, total: float | None, unit: str, output_unit: str | None = None
) -> AbstractContextManager[Callable[..., None]]:
    """A context that yields `advance(amount)`, or `advance(amount, output)` for what comes out in `output_unit`.

    It draws on stderr, and only when that is a terminal.
    """
    if sys.stderr.isatty():
        return _Bar(description, total, unit, output_unit)
    return nullcontext(lambda amount, output=0.0: None)


def si(number: float, unit: str = "") -> str:
    """Returns `number` with three digits and an SI prefix: `1.23M`, `1.23M tokens`, `1.23 MB`."""
    prefix = ""
    for limit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            number, prefix = number / limit, name
            break
    blank = " " if unit else ""
    return f"{number:.3g}{blank}{prefix}{unit}" if unit == "B" else f"{number:.3g}{prefix}{blank}{unit}"


def duration(seconds: float) -> str:
    """Returns a time for people: `42s`, `3m05s`, `2h07m`, `3d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    for size, big, small_size, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{big}{whole % size // small_size:02d}{small}"
    raise AssertionError(seconds)
