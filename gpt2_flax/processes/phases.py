"""What a process of a run is doing, since when, and how long that may take without progress."""

import contextlib
import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Literal

Kind = Literal["start", "step", "evaluation", "save", "end"]

FIRST = 7200.0  # seconds that the first of a kind may take, as programs are compiled
LEAST_STEP = 120.0  # seconds that a later step may take, and
LEAST = 1800.0  # a batch of an evaluation, its samples, or a save, or
TIMES = 20  # so many times as long as most steps, or as the longest of the others
PAUSE = 10.0  # seconds without a look at the clock after which this process was stopped itself, as by Ctrl-Z
_REMEMBERED = 100


class Phases:
    """A stage of a run: its start, steps with evaluations and saves between them, and its end.

    `marks` counts progress. All processes of a run count the same, so those with the fewest marks are behind.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.name, self.marks, self.limit = "nothing", 0, math.inf
        self._kind: Kind | None = None
        self._marked = self._looked = clock()
        self._stepping: float | None = None  # seconds of this step up to the last evaluation or save in it
        self._gaps: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._longest: dict[str, float] = {}
        self._saved = -math.inf  # when the last save began

    def start(self) -> None:
        """Begin a stage: all before its first step, whose programs are compiled anew."""
        self._gaps.clear()
        self._stepping = None
        self._enter("start", "the start")

    def step(self, step: int) -> None:
        """Begin to wait for a step that was dispatched, so the step before it is finished."""
        gap = self._mark()
        if self._stepping is None:
            self._took("start", gap)
        else:
            self._gaps["step"].append(self._stepping + gap)
        self._stepping = 0.0
        self._enter("step", f"step {step}")

    @contextlib.contextmanager
    def during(self, kind: Literal["evaluation", "save"], step: int) -> Iterator[None]:
        """Evaluate or save between two steps, or before the first."""
        kind_before, before, gap = self._kind, self.name, self._mark()
        if self._stepping is not None:
            self._stepping += gap
        self._enter(kind, f"the {kind} at step {step}")
        begun = self._marked
        if kind == "save":
            self._saved = begun
        yield
        self.progress()
        self._took(kind, self._marked - begun)
        self._enter(kind_before, before)

    def progress(self) -> None:
        """Note progress within an evaluation."""
        self._gaps[self._kind].append(self._mark())
        self._enter(self._kind, self.name)

    def end(self) -> None:
        """End a stage: only its files remain to be closed."""
        self._mark()
        self._enter("end", "the end")

    def longest(self, kind: Kind) -> float:
        """Return the seconds of the longest phase of a kind, of steps among the last hundred; 0 when none is over."""
        return max(self._gaps["step"], default=0.0) if kind == "step" else self._longest.get(kind, 0.0)

    def still_saving(self) -> float:
        """Return the seconds that the last save may still take in the background."""
        return max(0.0, self._saved + self.longest("save") - self.clock())

    def waited(self) -> float:
        """Return the seconds since the last progress, without those in which this process was stopped.

        Call it at least every few seconds.
        """
        now = self.clock()
        if now - self._looked > PAUSE:
            self._marked = min(now, self._marked + now - self._looked)
        self._looked = now
        return now - self._marked

    def _took(self, kind: Kind, seconds: float) -> None:
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def _mark(self) -> float:
        now = self.clock()
        gap, self._marked = now - self._marked, now
        self.marks += 1
        return gap

    def _enter(self, kind: Kind, name: str) -> None:
        before, self._kind, self.name = self._gaps[kind], kind, name
        if not before:
            self.limit = FIRST
        elif kind == "step":
            self.limit = max(LEAST_STEP, TIMES * statistics.median(before))
        else:
            self.limit = max(LEAST, TIMES * max(before))


def hang(name: str, waited: float, limit: float) -> str:
    """Return what is wrong when a process has waited for longer than the limit of its phase."""
    return f"no progress in {name} for {waited:.0f} s, and its limit is {limit:.0f} s"
