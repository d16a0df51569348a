"""Parse the text of a compiled program (`compiled.as_text()`): its computations, their callees and trip counts.

XLA writes optimized HLO for CPUs, GPUs and TPUs as one computation after another, with one instruction on a line.
"""

import re
from collections.abc import Iterator
from math import prod

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+)\b.*\{\s*$")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")

Computations = dict[str, list[str]]
"""The lines of each computation by its name; "ENTRY" is the program."""


def computations(hlo: str) -> Computations:
    """Split a program into its computations."""
    found: Computations = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if line.startswith(" "):
            lines.append(line)
        elif header := _COMPUTATION.match(line):
            lines = found["ENTRY" if line.startswith("ENTRY") else header[1]] = []
    return found


def callees(line: str, within: Computations) -> Iterator[tuple[str, int]]:
    """Yield each computation that an instruction runs, and how often it runs it."""
    times = _trips(line, within) if " while(" in line else 1
    for name in _CALLS.findall(line):
        yield name, times
    for names in _BRANCHES.findall(line):
        yield from ((name.strip().lstrip("%"), 1) for name in names.split(","))


def bytes_of(shape: str) -> int:
    """Return the bytes of an array, or of all arrays of a tuple."""
    bits = 0
    for dtype, sizes in _ARRAY.findall(shape):
        width = re.search(r"\d+", dtype)  # f32, bf16, f8e4m3fn, s4; pred takes a byte
        bits += (int(width[0]) if width else 8) * prod(int(size) for size in sizes.split(",") if size)
    return bits // 8


def elements(shape: str) -> list[str]:
    """Return the shapes of a tuple's elements, or the shape itself if it is an array's."""
    if not shape.startswith("("):
        return [shape]
    depth, found = 0, [""]
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return found


def _trips(line: str, within: Computations) -> int:
    """Return how often the body of a while loop runs, or 1 if the program does not say."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", line):
        return int(known[1])
    # A TPU's program has the condition "element i of the loop's state < constant". The body adds a constant to the
    # element, more than 1 if the loop was unrolled. The count begins at 0.
    named = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", line))
    condition, body = (_definitions(within.get(named.get(key, ""), [])) for key in ("condition", "body"))
    compared = re.search(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", condition.get("ROOT", ""))
    element = compared and re.search(r"index=(\d+)", condition.get(compared[1], ""))
    end = compared and re.search(r"constant\((\d+)\)", condition.get(compared[2], ""))
    if not (element and end):
        return 1
    state = re.sub(r"/\*.*?\*/", "", body.get("ROOT", "").partition(" tuple(")[2]).partition(")")[0].split(",")
    added = re.search(r"add\(\S+ %?([\w.\-]+)\)", body.get(state[int(element[1])].strip().lstrip("%"), ""))
    step = added and re.search(r"constant\((\d+)\)", body.get(added[1], ""))
    return -(-int(end[1]) // (int(step[1]) if step else 1))


def _definitions(lines: list[str]) -> dict[str, str]:
    """Return the instructions of a computation by name; the result of the computation is named "ROOT"."""
    matches = [re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line) for line in lines]
    return {"ROOT" if found[1] else found[2]: found.string for found in matches if found}
