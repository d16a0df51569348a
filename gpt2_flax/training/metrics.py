"""Numbers of a run: lines on the screen, metrics.jsonl, TensorBoard events."""

import json
import math
import time
from contextlib import AbstractContextManager
from typing import Any

from tensorboardX import SummaryWriter

from gpt2_flax.checkpoint.run_folder import RunFolder


class MetricsLog(AbstractContextManager):
    """Writes on one process of a run; the others are given `run=None` and stay silent.

    A step that is repeated after a restart is written again: the last line of a step counts.
    """

    def __init__(self, run: RunFolder | None):
        self._file = open(run.metrics, "a", encoding="utf-8") if run else None  # noqa: SIM115 (closed in __exit__)
        self._events = SummaryWriter(str(run.tensorboard)) if run else None

    def __exit__(self, *exception: object) -> None:
        if self._file:
            self._file.close()
            self._events.close()

    def write(self, step: int, values: dict[str, float], line: str) -> None:
        """Adds the values of a step, with names such as `train/loss`, and prints `line`."""
        if not self._file:
            return
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        record |= {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self.say(line)

    def say(self, line: str) -> None:
        """Prints a line, on the process that prints."""
        if self._file:
            print(line, flush=True)
