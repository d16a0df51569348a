"""Progress bars and states on a terminal, and numbers and durations for people."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

from gpt2_flax.interruption import cleaned_up

Draw = Callable[[str, float | None], AbstractContextManager[Callable[..., None]]]
_draws: list[Draw] = []


@contextlib.contextmanager
def progress_bar(
    description: str, total: float | None, unit: str, output_unit: str | None = None
) -> Iterator[Callable[..., None]]:
    """Show a bar with rates and the remaining time on stderr, if that is a terminal.

    Yields:
        `advance(amount)`, or `advance(amount, output)` if the bar also shows the mean rate of output in `output_unit`.
    """
    if _draws:
        with _draws[-1](description, total) as draw:
            yield lambda amount, output=0.0: draw(amount)
        return
    if not sys.stderr.isatty():
        yield lambda amount, output=0.0: None
        return
    columns = ("{task.description}", BarColumn(), "{task.percentage:>3.0f}%", "{task.fields[rates]}")
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    bar.add_task(description, total=total, rates="")
    (task,) = bar.tasks
    total_output = 0.0

    def advance(amount: float, output: float = 0.0) -> None:
        nonlocal total_output
        total_output += output
        bar.advance(task.id, amount)
        speed = task.finished_speed or task.speed
        rates = [] if speed is None else [f"{si(speed, unit)}/s"]
        if output_unit and task.elapsed:
            rates.append(f"{si(total_output / task.elapsed, output_unit)}/s")
        bar.update(task.id, rates=" ".join(rates))

    with cleaned_up(bar.stop), bar:  # `stop` shows the cursor again
        yield advance


@contextlib.contextmanager
def status(doing: str) -> Iterator[Callable[[str], object]]:
    """Show what takes so long on stderr, if that is a terminal; yield a function that replaces the text."""
    if _draws or not sys.stderr.isatty():
        with _draws[-1](doing, None) if _draws else contextlib.nullcontext():
            yield lambda doing: None
        return
    shown = Console(stderr=True).status(doing)
    with cleaned_up(shown.stop), shown:  # `stop` shows the cursor again
        yield shown.update


@contextlib.contextmanager
def drawn_by(draw: Draw) -> Iterator[None]:
    """Let `draw` show all bars and states within the block, because two live displays of one terminal spoil each other.

    Args:
        draw: gets a description and a total, which may be None; returns a context that yields `advance(amount)`.
    """
    _draws.append(draw)
    try:
        yield
    finally:
        _draws.remove(draw)


def si(number: float, unit: str = "") -> str:
    """Return `number` with three digits and an SI prefix: `1.23M`, `1.23M tokens`, `1.23 MB`."""
    prefix = ""
    for limit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            number, prefix = number / limit, name
            break
    blank = " " if unit else ""
    return f"{number:.3g}{blank}{prefix}{unit}" if unit == "B" else f"{number:.3g}{prefix}{blank}{unit}"


def duration(seconds: float) -> str:
    """Return a duration: `42s`, `3m05s`, `2h07m`, `3d04h`."""
    whole = round(seconds)
    for size, big, small_size, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{big}{whole % size // small_size:02d}{small}"
    return f"{whole}s"
