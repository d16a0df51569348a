"""Event files of TensorBoard, written by the thread that trains, so that no error stays unseen."""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_FLUSH_SECONDS = 30.0


class TensorBoard:
    """Appends events to a new file in `folder`, which the first event creates.

    The first error stops all further events with a warning through `say`; training continues.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self._folder, self._say, self._writer, self._failed, self._flushed = folder, say, None, False, 0.0

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of a step by name."""
        # Imported late: where torch is installed tensorboardX imports torch, which takes seconds.
        from tensorboardX.summary import scalar

        self._add(step, [part for name, value in values.items() for part in scalar(name, value).value])

    def add_text(self, step: int, name: str, text: str) -> None:
        """Add a text in Markdown."""
        from tensorboardX.summary import text as text_summary

        self._add(step, text_summary(name, text).value)

    def close(self) -> None:
        """Write the events that are still in memory."""
        with self._warning():
            if self._writer:
                self._writer.close()

    def _add(self, step: int, parts: Any) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        with self._warning():
            if self._failed:
                return
            if not self._writer:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._writer = EventsWriter(str(self._folder / "events"))
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=parts)))
            if time.monotonic() - self._flushed > _FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    @contextlib.contextmanager
    def _warning(self) -> Any:
        try:
            yield
        except OSError as error:
            self._failed, self._writer = True, None
            self._say(f"warning: no more events for TensorBoard ({error.strerror}): {self._folder}; the run continues")
