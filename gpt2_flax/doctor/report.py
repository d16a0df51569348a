"""The results of a check: JSON records, one on a line, from the process of the check to the program."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Case = TypeVar("Case")
Record = dict[str, Any]


class Report:
    """Writes each result of a check at once, so that a crash loses no earlier result."""

    def __init__(self, write: Callable[[Record], object], seconds: float):
        self._write, self._end = write, time.monotonic() + seconds

    def line(self, name: str, text: str, **values: Any) -> None:
        """Add a fact: a name and a text for people, values for programs. Values that are not finite become null."""
        finite = json.loads(json.dumps(values), parse_constant=lambda not_finite: None)
        self._write({"name": name, "text": text, **finite})

    def wrong(self, sentence: str) -> None:
        """Add a fault of this machine or its software, and what to do."""
        self._write({"wrong": sentence})

    def affordable(self, cases: Iterable[tuple[str, Case]]) -> Iterator[Case]:
        """Yield the named cases while there is time for another case as slow as the slowest; skip the rest."""
        slowest = 0.0
        for name, case in cases:
            start = time.monotonic()
            if self._end - start < 1.2 * slowest:
                self._write({"skipped": name})
                continue
            yield case
            slowest = max(slowest, time.monotonic() - start)
