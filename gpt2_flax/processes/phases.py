"""The phases of a process in a run, and the limit of each phase: the longest time without progress."""

import contextlib
import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Literal

Kind = Literal["start", "step", "evaluation", "save", "end"]

FIRST = 7200.0  # seconds; limit of the first phase of a kind, in which programs are compiled
LEAST_STEP = 120.0  # seconds; least limit of later steps
LEAST = 1800.0  # seconds; least limit of an evaluated batch, the samples, or a save
TIMES = 20  # limit relative to the median of the steps, and to the longest of the other phases
PAUSE = 10.0  # seconds between two looks at the clock after which this process was stopped, as by Ctrl-Z
AGAIN = "start the same command again to resume from the newest checkpoint"
_REMEMBERED = 100


class Phases:
    """The phases of a stage: its start, its steps with evaluations and saves between them, and its end.

    `marks` counts progress. All processes of a run count alike, so the processes with the fewest marks are behind.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.name, self.marks, self.limit = "nothing", 0, math.inf
        self._kind: Kind = "end"
        self._marked = self._looked = clock()
        self._stepping: float | None = None  # seconds of this step up to the last evaluation or save in it
        self._gaps: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._longest: dict[str, float] = {}
        self._saved = -math.inf  # when the last save began

    def start(self) -> None:
        """Begin a stage; the limits of phases start anew, because programs are compiled anew."""
        self._gaps.clear()
        self._stepping = None
        self._enter("start", "the start")

    def step(self, step: int) -> None:
        """Begin to wait for a step that was dispatched; the step before it has finished."""
        gap = self._mark()
        if self._stepping is None:
            self._took("start", gap)
        else:
            self._gaps["step"].append(self._stepping + gap)
        self._stepping = 0.0
        self._enter("step", f"step {step}")

    @contextlib.contextmanager
    def during(self, kind: Literal["evaluation", "save"], step: int) -> Iterator[None]:
        """Evaluate or save between two steps, or before the first step."""
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
        """End a stage; what remains is to close its files."""
        self._mark()
        self._enter("end", "the end")

    def longest(self, kind: Kind) -> float:
        """Return the seconds of the longest phase of a kind, or 0; for steps, the longest of the last hundred."""
        return max(self._gaps["step"], default=0.0) if kind == "step" else self._longest.get(kind, 0.0)

    def still_saving(self) -> float:
        """Return how many more seconds the last save may take in the background."""
        return max(0.0, self._saved + self.longest("save") - self.clock())

    def waited(self) -> float:
        """Return the seconds since the last progress, without the time in which this process was stopped.

        Call this at least every few seconds.
        """
        now = self.clock()
        if now - self._looked > PAUSE:
            self._marked = min(now, self._marked + now - self._looked)
        self._looked = now
        return now - self._marked

    def _took(self, kind: Kind, seconds: float) -> None:
        self._longest[kind] = max(seconds, self._longest.get(kind, 0.0))

    def _mark(self) -> float:
        """Count progress; return the seconds since the progress before."""
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
    """Return the error text for a process that has made no progress in phase `name` within its limit, in seconds."""
    return f"no progress in {name} for {waited:.0f} s, and its limit is {limit:.0f} s"
