"""What a compiled program sends between devices, read from its text (`compiled.as_text()`).

The text is that of XLA's optimised HLO for CPU, GPU or TPU: one computation after another, one instruction a line.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from math import prod
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+)\b.*\{\s*$")
# A collective that runs in the background is a pair of -start and -done; the start alone is counted.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLS = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """How often a device takes part in one kind of collective, and what it sends in all of them on a ring."""

    count: int
    bytes_sent: int


def collectives(hlo: str) -> dict[str, Collective]:
    """Returns those of KINDS that the program runs, loops unrolled.

    What happens in a loop counts as often as the loop runs, or once where that is not written down (a `lax.scan` is, a
    `lax.while_loop` is not). Of a conditional all branches count. A collective of a device with itself is none.
    """
    computations = dict(_computations(hlo))
    n_devices = prod(int(n) for n in re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", hlo.split("\n", 1)[0]))

    @cache
    def run(name: str) -> dict[str, Collective]:
        total = defaultdict(lambda: Collective(0, 0))
        for line in computations.get(name, ()):
            parts = [(times, run(callee)) for callee, times in _callees(line, computations)]
            if (found := _COLLECTIVE.search(line)) and (sent := _bytes_sent(found, n_devices)):
                # A TPU's compiler writes a reduce-scatter as an all-reduce and a slice, fused.
                fused = found[2] == "all-reduce" and name.startswith("all-reduce-scatter")
                parts.append((1, {"reduce-scatter" if fused else found[2]: Collective(1, sent // (2 if fused else 1))}))
            for times, part in parts:
                for kind, (count, sent) in part.items():
                    total[kind] = Collective(total[kind].count + times * count, total[kind].bytes_sent + times * sent)
        return dict(total)

    return run("ENTRY")


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the name of each computation ("ENTRY" for the one that is the program) and its lines."""
    lines: list[str] = []
    for line in hlo.splitlines():
        if line.startswith(" "):
            lines.append(line)
        elif header := _COMPUTATION.match(line):
            lines = []
            yield ("ENTRY" if line.startswith("ENTRY") else header[1]), lines


def _callees(line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """Yields the computations that an instruction runs, and how often each time."""
    times = _trips(line, computations) if " while(" in line else 1
    for name in _CALLS.findall(line):
        yield name, times
    for names in _BRANCHES.findall(line):
        yield from ((name.strip().lstrip("%"), 1) for name in names.split(","))


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """Returns how often the body of a while loop runs, 1 when nothing says it."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", line):
        return int(known[1])
    # A TPU's compiler leaves a condition, element i of the loop's state < constant, and adds a constant to it a trip,
    # more than 1 when it has unrolled the loop; it counts from 0.
    callees = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", line))
    condition, body = (_definitions(computations.get(callees.get(key), [])) for key in ("condition", "body"))
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
    """Returns the instructions of a computation by their names, and as "ROOT" the one that is its result."""
    matches = [re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line) for line in lines]
    return {"ROOT" if found[1] else found[2]: found.string for found in matches if found}


def _bytes_sent(found: re.Match, n_devices: int) -> int:
    """Returns what a device sends in the collective that `_COLLECTIVE` found."""
    shape, kind, start = found.groups()
    line = found.string
    size = _bytes_of(_result(shape, kind) if start else shape)
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
        return size if any(source != target for source, target in pairs) else 0
    n = _group_size(line, n_devices)
    # On a ring of n every device passes on n - 1 parts of the whole, in an all-reduce twice; of a reduce-scatter
    # the result is one part.
    factor = {"all-reduce": 2, "reduce-scatter": n}.get(kind, 1)
    return factor * (n - 1) * size // n


def _result(shape: str, kind: str) -> str:
    """Returns the part of a -start's shape that is the result: but for all-reduce it is (operands, results, ...)."""
    if kind == "all-reduce" and not shape.startswith("(("):
        return shape
    depth, parts = 0, [""]
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts[1]


def _bytes_of(shape: str) -> int:
    """Returns the bytes of an array or of all arrays of a tuple."""
    bits = 0
    for dtype, sizes in _ARRAY.findall(shape):
        width = re.search(r"\d+", dtype)  # f32, bf16, f8e4m3fn, s4; pred takes a byte
        bits += (int(width[0]) if width else 8) * prod(int(size) for size in sizes.split(",") if size)
    return bits // 8


def _group_size(line: str, n_devices: int) -> int:
    """Returns how many devices a collective is between; its groups are equally large."""
    groups = line.partition("replica_groups=")[2]
    if mesh := re.match(r"\S*mesh\[(.*?)\].*?\{(.*?)\}", groups):  # mesh['a'=2,'b'=4] {'a','b':(1)2}
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return prod(int(part or sizes[axis]) for axis, part in axes)
    if iota := re.match(r"\[(?:\d+,)*(\d+)\]<=", groups):  # [2,4]<=[8], [4,2]<=[2,4]T(1,0): groups, devices a group
        return int(iota[1])
    first = re.match(r"\{\{([\d,]*)\}", groups)  # {{0,1},{2,3}}; {} or nothing: all devices
    return len(first[1].split(",")) if first else n_devices
