"""Documents out of a JSON list, or of values that span lines: read value by value, however long the file is."""

import json
import re
from collections.abc import Iterable, Iterator

from gpt2_flax.text.documents import Faults, Texts, in_parts
from gpt2_flax.text.encodings import Bad
from gpt2_flax.text.json_lines import DECODER, LONGEST_RECORD, text_of

_TOO_LONG = f"record longer than {LONGEST_RECORD // 2**20} MiB"
_BLANKS = re.compile(r"[ \t\n\r]*")


def json_values(pieces: Iterable[str | Bad], field: str, faults: Faults) -> Iterator[Texts]:
    """Yields the text of each value: a string is its own text, an object has its text in `field`.

    A list yields the texts of its values. The file ends at a fault, since nothing says where the next value begins.
    """
    reader = _Values(field, faults)
    for piece in pieces:
        if isinstance(piece, Bad):
            yield from in_parts(list(reader.ready(last=False)))
            reader.leave_out(piece)
        else:
            reader.add(piece)
            if reader.worth_reading:
                yield from in_parts(list(reader.ready(last=False)))
        if reader.broken:
            return
    yield from in_parts(list(reader.ready(last=True)))


class _Values:
    def __init__(self, field: str, faults: Faults):
        self._field, self._faults = field, faults
        self._pieces: list[str] = []  # of what has not been parsed
        self._length = self._enough = 0  # of them; and from which length on another try pays
        self._line = 0  # lines before them
        self._in_list = self._after_value = False
        self.broken = False

    @property
    def worth_reading(self) -> bool:
        return self._length >= self._enough

    def add(self, piece: str) -> None:
        self._pieces.append(piece)
        self._length += len(piece)

    def leave_out(self, bad: Bad) -> None:
        self.broken = True
        self._faults.leave_out(bad, "file")

    def ready(self, last: bool) -> Iterator[str]:
        """Yields the texts of the values that are complete by now; `last`: nothing comes after them."""
        text = "".join(self._pieces)
        at = self._before_value(text, 0)
        while at < len(text) and (found := self._value(text, at, last)):
            value, stop = found
            raw = text[at:stop]
            document = text_of(value, raw, self._field, self._line, self._faults)
            self._line += raw.count("\n")
            self._after_value = True
            at = self._before_value(text, stop)
            if document:
                yield document
        if last and self._in_list and not self.broken:
            self.leave_out(Bad(self._line, "not JSON (the list has no end)"))
        self._pieces, self._length = [text[at:]], len(text) - at
        self._enough = min(2 * self._length, LONGEST_RECORD)

    def _before_value(self, text: str, at: int) -> int:
        """Passes over blanks, and what stands between the values of a list."""
        while True:
            stop = _BLANKS.match(text, at).end()
            self._line += text.count("\n", at, stop)
            sign, at = text[stop : stop + 1], stop + 1
            if sign == "[" and not self._in_list:
                self._in_list, self._after_value = True, False
            elif sign == "]" and self._in_list:
                self._in_list = False
            elif sign == "," and self._in_list and self._after_value:
                self._after_value = False
            else:
                return stop

    def _value(self, text: str, at: int, last: bool) -> tuple[object, int] | None:
        """Returns a value and where it stops; None if the value is incomplete or not JSON."""
        try:
            if self._in_list and self._after_value:
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            value, stop = DECODER.raw_decode(text, at)
            if stop - at <= LONGEST_RECORD // 4 or len(text[at:stop].encode()) <= LONGEST_RECORD:
                return (value, stop) if last or stop < len(text) else None  # a number may have more digits
            self.leave_out(Bad(self._line, _TOO_LONG))
        except json.JSONDecodeError as error:
            if len(text[at:].encode()) > LONGEST_RECORD:
                self.leave_out(Bad(self._line, _TOO_LONG))
            elif last or (self._in_list and self._after_value):
                self.leave_out(Bad(self._line + text.count("\n", at, error.pos), f"not JSON ({error.msg})"))
        except RecursionError:
            self.leave_out(Bad(self._line, "not JSON (nested too deeply)"))
        return None
