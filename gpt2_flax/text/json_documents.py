"""Read documents from JSON: lines with one object each, or a list, or values that span lines.

Neither reader holds more than the longest record: one reads line by line, the other value by value.
"""

import json
import re
from collections.abc import Iterable, Iterator

from gpt2_flax.errors import quote
from gpt2_flax.text.documents import Faults, Texts, in_slices
from gpt2_flax.text.encodings import Bad

LONGEST_RECORD = 2**26  # bytes of UTF-8

# A number is never the text, and `int` refuses numbers of thousands of digits.
DECODER = json.JSONDecoder(parse_int=float)
_BLANKS = re.compile(r"[ \t\n\r]*+")
_SURROGATES = re.compile("[\ud800-\udfff]")
_TOO_DEEP = "not JSON (nested too deeply)"


def json_lines(pieces: Iterable[str | Bad], field: str, faults: Faults) -> Iterator[Texts]:
    """Yield the `field` of the object on each line; `pieces` come from `encodings.TextPieces`.

    A fault leaves out its line.
    """
    reader = _LineReader(field, faults)
    for piece in pieces:
        yield from in_slices(reader.read(piece))
    yield from in_slices(list(filter(None, [reader.end_line()])))


def json_values(pieces: Iterable[str | Bad], field: str, faults: Faults) -> Iterator[Texts]:
    """Yield the text of each value, or of each value in a list: a string, or the `field` of an object.

    A fault leaves out the rest of the file, because nothing shows where the next value begins.
    """
    reader = _ValueReader(field, faults)
    for piece in pieces:
        if isinstance(piece, Bad):
            yield from in_slices(list(reader.read(last=False)))
            reader.leave_out_rest(piece.line, piece.reason)
        else:
            reader.add(piece)
            if reader.worth_reading:
                yield from in_slices(list(reader.read(last=False)))
        if reader.broken:
            return
    yield from in_slices(list(reader.read(last=True)))


def holds_lines(beginning: str) -> bool:
    """Return whether a file with this beginning holds JSON lines, rather than a list or values that span lines."""
    first, _, others = beginning.lstrip().partition("\n")
    if first.startswith("["):
        return False
    if not others.strip() or _is_json(first):
        return True
    return first.strip() != "{" and not _is_json(beginning.strip())


class _LineReader:
    """Puts lines together from pieces, and takes the text out of each."""

    def __init__(self, field: str, faults: Faults):
        self._field, self._faults = field, faults
        self._line = 0  # lines that have ended
        # The current line:
        self._fragments: list[str] = []
        self._n_bytes, self._left_out = 0, False

    def read(self, piece: str | Bad) -> list[str]:
        """Return the texts of the lines that end in this piece."""
        if isinstance(piece, Bad):
            self._leave_out(piece)
            return []
        first, *others = piece.split("\n")
        self._add(first)
        if not others:
            return []
        texts = [self.end_line()]
        *records, last = others
        for record in records:
            texts.append(self._text(record))
            self._line += 1
        self._add(last)
        return [text for text in texts if text]

    def end_line(self) -> str | None:
        """Return the text of the current line, if it holds one, and begin the next line."""
        record, left_out = "".join(self._fragments), self._left_out
        self._fragments, self._n_bytes, self._left_out = [], 0, False  # before parsing, since a record may be long
        text = None if left_out else self._text(record)
        self._line += 1
        return text

    def _add(self, fragment: str) -> None:
        if fragment and not self._left_out:
            self._fragments.append(fragment)
            self._n_bytes += len(fragment.encode())
            if self._n_bytes > LONGEST_RECORD:
                self._leave_out(Bad(self._line, _too_long()))

    def _leave_out(self, bad: Bad) -> None:
        if not self._left_out:
            self._fragments, self._left_out = [], True
            self._faults.leave_out(bad)

    def _text(self, record: str) -> str | None:
        if not record or record.isspace():
            return None
        try:
            value = DECODER.decode(record)
        except json.JSONDecodeError as error:
            reason = f"not JSON ({error.msg} at character {error.pos + 1})"
        except RecursionError:
            reason = _TOO_DEEP
        else:
            if isinstance(value, dict):
                return _text_of(value, record, self._field, self._line, self._faults)
            reason = f"not a JSON object but {_json_name(value)}: one object a line is needed"
        self._faults.leave_out(Bad(self._line, reason))
        return None


class _ValueReader:
    """Parses the values that are complete in the text read so far, and keeps the rest of that text."""

    def __init__(self, field: str, faults: Faults):
        self._field, self._faults = field, faults
        self._pieces: list[str] = []  # text not parsed yet
        self._length = 0  # characters of that text
        self._enough = 0  # the length from which it is parsed again: parsing each piece would take quadratic time
        self._line = 0  # lines before that text
        self._in_list = self._after_value = False
        self.broken = False

    @property
    def worth_reading(self) -> bool:
        return self._length >= self._enough

    def add(self, piece: str) -> None:
        self._pieces.append(piece)
        self._length += len(piece)

    def leave_out_rest(self, line: int, reason: str) -> None:
        self.broken = True
        self._faults.leave_out(Bad(line, reason), "file")

    def read(self, last: bool) -> Iterator[str]:
        """Yield the texts of the complete values; `last` says that no more text follows."""
        text = "".join(self._pieces)
        at = self._skip_to_value(text, 0)
        while at < len(text) and (found := self._value(text, at, last)):
            value, stop = found
            raw = text[at:stop]
            document = _text_of(value, raw, self._field, self._line, self._faults)
            self._line += raw.count("\n")
            self._after_value = True
            at = self._skip_to_value(text, stop)
            if document:
                yield document
        if last and self._in_list and not self.broken:
            self.leave_out_rest(self._line, "not JSON (the list has no end)")
        self._pieces, self._length = [text[at:]], len(text) - at
        self._enough = min(2 * self._length, LONGEST_RECORD)

    def _skip_to_value(self, text: str, at: int) -> int:
        """Return where the next value begins, after blanks and the brackets and commas of a list."""
        while True:
            stop = at + len(_BLANKS.match(text, at)[0])  # pyright: ignore[reportOptionalSubscript] - it always matches
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
        """Return the value at `at` and where it stops, or None if it is incomplete or not JSON."""
        no_comma = self._in_list and self._after_value
        try:
            if no_comma:
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            value, stop = DECODER.raw_decode(text, at)
            if stop - at <= LONGEST_RECORD // 4 or len(text[at:stop].encode()) <= LONGEST_RECORD:
                return (value, stop) if last or stop < len(text) else None  # a number may have more digits
            self.leave_out_rest(self._line, _too_long())
        except json.JSONDecodeError as error:
            if len(text[at:].encode()) > LONGEST_RECORD:
                self.leave_out_rest(self._line, _too_long())
            elif last or no_comma:
                self.leave_out_rest(self._line + text.count("\n", at, error.pos), f"not JSON ({error.msg})")
        except RecursionError:
            self.leave_out_rest(self._line, _TOO_DEEP)
        return None


def _too_long() -> str:
    return f"record longer than {LONGEST_RECORD // 2**20} MiB"


def _is_json(text: str) -> bool:
    try:
        DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _text_of(value: object, raw: str, field: str, line: int, faults: Faults) -> str | None:
    """Return the text of a record that was parsed from `raw`, or None if the text is blank or the record is faulty."""
    try:
        text = _field(value, field)
        # JSON can express a lone surrogate, which is not Unicode text.
        if "\\u" in raw and (lone := _SURROGATES.search(text)):
            reason = f"half a surrogate pair (character {lone.start() + 1} is U+{ord(lone[0]):04X})"
            if not faults.replacing:
                raise ValueError(reason)
            faults.replace(Bad(line, reason))
            text = _SURROGATES.sub("\ufffd", text)
    except ValueError as error:
        faults.leave_out(Bad(line, str(error)))
        return None
    return text if text.strip() else None


def _field(record: object, field: str) -> str:
    """Return the text of a record: itself, or its `field`. Raises ValueError with the reason if it has none."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(f"neither a JSON object nor a string but {_json_name(record)}")
    value, rest = record, field
    while True:
        if isinstance(value, dict) and rest in value:  # a name that holds the dots itself
            value = value[rest]
            break
        key, dot, rest = rest.partition(".")
        if not dot or not isinstance(value, dict) or key not in value:
            raise ValueError(f"no field {quote(field)}")
        value = value[key]
    if not isinstance(value, str):
        raise ValueError(f"field {quote(field)} is {_json_name(value)}, not a string")
    return value


def _json_name(value: object) -> str:
    """Return what JSON calls the type of a value."""
    names: dict[type, str] = {dict: "an object", list: "a list", bool: "true or false", float: "a number"}
    return names.get(type(value), "null" if value is None else "a string")
