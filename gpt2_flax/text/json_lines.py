"""Documents out of JSON lines: one field of each record."""

import json
import re
from collections.abc import Iterable, Iterator

from gpt2_flax.errors import quote
from gpt2_flax.text.documents import Faults, Texts, in_parts
from gpt2_flax.text.encodings import Bad

LONGEST_RECORD = 2**26  # bytes of UTF-8

DECODER = json.JSONDecoder(parse_int=float)  # no text is a number, and `int` refuses numbers of thousands of digits

_JSON_NAMES = {dict: "an object", list: "a list", bool: "true or false", float: "a number"}
_SURROGATES = re.compile("[\ud800-\udfff]")


def json_documents(pieces: Iterable[str | Bad], field: str, faults: Faults) -> Iterator[Texts]:
    """Yields the `field` of each line, a JSON object; see `decoding.TextPieces` for the pieces."""
    reader = _Records(field, faults)
    for piece in pieces:
        yield from in_parts(reader.read(piece))
    yield from in_parts(reader.end())


def holds_lines(beginning: str) -> bool:
    """Returns whether a file that begins so is one of JSON lines, not a list or a value of several lines."""
    first, _, others = beginning.lstrip().partition("\n")
    if first.startswith("["):
        return False
    if not others.strip() or _is_json(first):
        return True
    return first.strip() != "{" and not _is_json(beginning.strip())


def text_of(value: object, raw: str, field: str, line: int, faults: Faults) -> str | None:
    """Returns what the field of a record, parsed from `raw`, holds; nothing when that is blank or the record broken."""
    try:
        text = _field(value, field)
        if "\\u" in raw:
            text = _valid(text, line, faults)
    except ValueError as error:
        faults.leave_out(Bad(line, str(error)))
        return None
    return text if text.strip() else None


class _Records:
    def __init__(self, field: str, faults: Faults):
        self._field, self._faults = field, faults
        self._line = 0  # that have ended
        self._begun: list[str] = []  # pieces of a record whose end is still to come
        self._length = 0
        self._left_out = False  # that record

    def read(self, piece: str | Bad) -> list[str]:
        """Returns the texts of the records that end in this piece."""
        if isinstance(piece, Bad):
            self._leave_out(piece)
            return []
        first, *others = piece.split("\n")
        self._add(first)
        if not others:
            return []
        texts = [self._end_record()]
        *records, last = others
        for record in records:
            texts.append(self._text(record))
            self._line += 1
        self._add(last)
        return [text for text in texts if text]

    def end(self) -> list[str]:
        return [text for text in [self._end_record()] if text]

    def _add(self, fragment: str) -> None:
        if self._left_out or not fragment:
            return
        self._begun.append(fragment)
        self._length += len(fragment.encode())
        if self._length > LONGEST_RECORD:
            self._leave_out(Bad(self._line, f"record longer than {LONGEST_RECORD // 2**20} MiB"))

    def _leave_out(self, bad: Bad) -> None:
        if not self._left_out:
            self._begun, self._left_out = [], True
            self._faults.leave_out(bad)

    def _end_record(self) -> str | None:
        record, left_out = "".join(self._begun), self._left_out
        self._begun, self._length, self._left_out = [], 0, False  # now, for it may be a long one
        text = None if left_out else self._text(record)
        self._line += 1
        return text

    def _text(self, record: str) -> str | None:
        """Returns what the field of one record holds; nothing when that is blank or the record is broken."""
        if not record or record.isspace():
            return None
        try:
            value = DECODER.decode(record)
        except json.JSONDecodeError as error:
            reason = f"not JSON ({error.msg} at character {error.pos + 1})"
        except RecursionError:
            reason = "not JSON (nested too deeply)"
        else:
            if isinstance(value, dict):
                return text_of(value, record, self._field, self._line, self._faults)
            reason = f"not a JSON object but {json_name(value)}: one object a line is needed"
        self._faults.leave_out(Bad(self._line, reason))
        return None


def _is_json(text: str) -> bool:
    try:
        DECODER.decode(text)
    except (ValueError, RecursionError):
        return False
    return True


def _valid(text: str, line: int, faults: Faults) -> str:
    """A lone surrogate can be written in JSON, but is not Unicode text."""
    first = _SURROGATES.search(text)
    if not first:
        return text
    reason = f"half a surrogate pair (character {first.start() + 1} is U+{ord(first[0]):04X})"
    if not faults.mending:
        raise ValueError(reason)
    faults.mend(Bad(line, reason))
    return _SURROGATES.sub("\ufffd", text)


def _field(record: object, field: str) -> str:
    """Raises ValueError with the reason when there is no text; a string is its own."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(f"neither a JSON object nor a string but {json_name(record)}")
    value, rest = record, field
    while True:
        if isinstance(value, dict) and rest in value:
            value = value[rest]
            break
        key, dot, rest = rest.partition(".")
        if not dot or not isinstance(value, dict) or key not in value:
            raise ValueError(f"no field {quote(field)}")
        value = value[key]
    if not isinstance(value, str):
        raise ValueError(f"field {quote(field)} is {json_name(value)}, not a string")
    return value


def json_name(value: object) -> str:
    """Returns what a value is, in the words of JSON."""
    return _JSON_NAMES.get(type(value), "null" if value is None else "a string")
