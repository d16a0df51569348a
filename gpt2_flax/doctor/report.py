"""What a part of the examination finds, one record of JSON a line, from its process to the program."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Case = TypeVar("Case")
Record = dict[str, Any]


class Report:
    """What one part writes down, as it finds it, so that a crash loses nothing of what came before."""

    def __init__(self, write: Callable[[Record], object], seconds: float):
        self._write, self._end = write, time.monotonic() + seconds

    def line(self, name: str, text: str, **values: Any) -> None:
        """Add a fact: a name and a text for people, and values for programs; what is not finite becomes null."""
        finite = json.loads(json.dumps(values), parse_constant=lambda not_finite: None)
        self._write({"name": name, "text": text, **finite})

    def wrong(self, sentence: str) -> None:
        """Add something that is wrong with this machine or its software, and what to do."""
        self._write({"wrong": sentence})

    def skipped(self, what: str) -> None:
        """Name what there was no time for."""
        self._write({"skipped": what})

    def affordable(self, cases: Iterable[tuple[str, Case]]) -> Iterator[Case]:
        """Yield cases while there is time for one that takes as long as the slowest so far; name the others."""
        slowest = 0.0
        for what, case in cases:
            start = time.monotonic()
            if self._end - start < 1.2 * slowest:
                self.skipped(what)
                continue
            yield case
            slowest = max(slowest, time.monotonic() - start)
