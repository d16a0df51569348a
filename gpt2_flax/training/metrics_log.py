"""The log of a run: lines on the screen, metrics.jsonl, samples.txt, and other programs that show metrics."""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_flax.checkpoint.run_folder import SAVED, RunFolder
from gpt2_flax.errors import Stopped, UserError, io_error, naming_file, printable
from gpt2_flax.training.screen import Screen

if TYPE_CHECKING:
    from gpt2_flax.training.loggers import Logger


class MetricsLog(AbstractContextManager):
    """The log of one process; every process except the first has `run=None` and writes nothing.

    A step that a resumed run repeats is written again, and its last line counts. Lines that do not fit on a full disk
    wait in memory, and are written later. Leaving the context raises `UserError` (IO) if they still do not fit.
    `on_step` is called with the record of each step, written or not. The `loggers` get all values and texts.
    """

    def __init__(
        self,
        run: RunFolder | None,
        screen: Screen | None = None,
        on_step: Callable[[dict[str, float]], object] | None = None,
    ):
        self._run, self.screen, self.on_step = run, screen or Screen(), on_step if run else None
        self.loggers: Sequence[Logger] = ()
        if run:
            self._records, self._texts = (_Lines(path, self.say) for path in (run.metrics, run.samples))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._run:
            for logger in self.loggers:
                logger.close(error is None or isinstance(error, Stopped))
            for lines in (self._records, self._texts):
                with contextlib.suppress(*((UserError,) if error else ())):  # report the first failure
                    lines.close()

    def write(self, step: int, values: dict[str, float], line: str) -> None:
        """Add the values of a step, with names such as `train/loss`, and print `line`."""
        if not self._run:
            return
        record = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._add_record(step, record)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for logger in self.loggers:
            logger.add_scalars(step, finite)
        self.say(line)

    def write_texts(self, step: int, texts: Sequence[str]) -> None:
        """Add texts that the model generated at a step, one a line, to samples.txt and to TensorBoard."""
        if not self._run or not texts:
            return
        lines = [printable(text) for text in texts]
        self._texts.add(step, "".join(f"step {step:>7}  {line}\n" for line in lines))
        for logger in self.loggers:
            logger.add_text(step, "samples", "\n\n".join(lines))

    def committed(self, step: int | None) -> None:
        """Record that the checkpoint of `step` was committed, so that a later loss is noticed; None: nothing."""
        if self._run and step is not None:
            self._add_record(step, {SAVED: step})

    def say(self, line: str) -> None:
        """Print a line."""
        if self._run:
            self.screen.say(line)

    def _add_record(self, step: int, values: Mapping[str, Any]) -> None:
        record = {"step": step, "time": round(time.time(), 3), **values}
        self._records.add(step, json.dumps(record, allow_nan=False) + "\n")


class _Lines:
    """A file to which lines are appended; completes a last line that a kill cut short."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self._path, self._say = path, say
        self._file: FileIO | None = None
        self._waiting, self._step = b"", 0  # bytes that a full disk refused, and the step of the first of them

    def add(self, step: int, lines: str) -> None:
        refused, self._step = bool(self._waiting), self._step if self._waiting else step
        self._waiting += lines.encode()
        try:
            self.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not refused:
                self._say(
                    f"warning: {error.strerror}: {self._path} at step {step}; the run continues, and writes it later"
                )

    def close(self) -> None:
        try:
            self.flush()
        except OSError as error:
            raise io_error(error, error.filename) from error
        finally:
            if self._file:
                self._file.close()

    def flush(self) -> None:
        with naming_file(f"{self._path} at step {self._step}"):
            if self._waiting and not self._file:
                self._file = open(self._path, "ab+", buffering=0)  # noqa: SIM115 - `close` closes it
                if self._file.tell():
                    self._file.seek(-1, os.SEEK_END)
                    self._waiting = (b"" if self._file.read() == b"\n" else b"\n") + self._waiting
            while self._file and self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
