"""Count the bytes that a compiled program sends between devices, from its text (`compiled.as_text()`), see `hlo`."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

from gpt2_flax.plan.hlo import bytes_of, callees, computations, elements

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# A collective in the background is a pair of -start and -done; only the start is counted.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")


@dataclass(frozen=True)
class Collective:
    """How often a device runs one kind of collective, and the bytes that it sends in all of them, on a ring."""

    count: int
    bytes_sent: int


def collectives(hlo: str, overlapped: bool = False) -> dict[str, Collective]:
    """Count the collectives that a program runs, by kind.

    A collective in a loop counts as often as the loop runs; the text states that for `lax.scan`, but not for
    `lax.while_loop`, whose body counts once. Of a conditional all branches count. A collective of a device with itself
    does not count.

    Args:
        hlo: text of the program.
        overlapped: whether to count only collectives that run in the background of a matrix product.
    """
    within = computations(hlo)
    n_devices = prod(int(n) for n in re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", hlo.split("\n", 1)[0]))

    @cache
    def run(name: str) -> dict[str, Collective]:
        total = defaultdict(lambda: Collective(0, 0))

        def add(kind: str, one: Collective, times: int = 1) -> None:
            before = total[kind]
            total[kind] = Collective(before.count + times * one.count, before.bytes_sent + times * one.bytes_sent)

        lines = within.get(name, ())
        for number, line in enumerate(lines):
            for callee, times in callees(line, within):
                for kind, one in run(callee).items():
                    add(kind, one, times)
            found = _COLLECTIVE.search(line)
            if found and overlapped and not (found[3] and any(map(multiplies, _until_done(lines[number:])))):
                continue
            if found and (sent := _bytes_sent(found, n_devices)):
                # A TPU's compiler fuses a reduce-scatter from an all-reduce and a slice.
                if found[2] == "all-reduce" and name.startswith("all-reduce-scatter"):
                    add("reduce-scatter", Collective(1, sent // 2))
                else:
                    add(found[2], Collective(1, sent))
        return dict(total)

    @cache
    def multiplies(line: str) -> bool:
        """Return whether an instruction runs a matrix product, of a library or of the compiler, also in its callees."""
        called = (inner for callee, _ in callees(line, within) for inner in within.get(callee, ()))
        return " dot(" in line or "__cublas" in line or any(map(multiplies, called))

    return run("ENTRY")


def _until_done(lines: Sequence[str]) -> Iterator[str]:
    """Yield the instructions that a scheduled program runs between the -start on the first of `lines` and its -done."""
    start = lines[0].partition(" = ")[0].strip().removeprefix("ROOT ").lstrip("%")
    done = re.compile(rf"-done\(.*?%?{re.escape(start)}\)")
    return itertools.takewhile(lambda line: not done.search(line), lines[1:])


def _bytes_sent(found: re.Match, n_devices: int) -> int:
    """Return the bytes that each device sends in a collective, found by `_COLLECTIVE`."""
    shape, kind, start = found.groups()
    line = found.string
    size = bytes_of(_result(shape, kind) if start else shape)
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
        return size if any(source != target for source, target in pairs) else 0
    n = _group_size(line, n_devices)
    # On a ring of n, each device sends n - 1 of n slices, twice in an all-reduce. The result of a reduce-scatter is
    # one slice.
    factor = {"all-reduce": 2, "reduce-scatter": n}.get(kind, 1)
    return factor * (n - 1) * size // n


def _result(shape: str, kind: str) -> str:
    """Return the result in the shape of a -start: the shape is (operands, results, ...), except in an all-reduce."""
    return shape if kind == "all-reduce" and not shape.startswith("((") else elements(shape)[1]


def _group_size(line: str, n_devices: int) -> int:
    """Return the number of devices of a collective; all its groups have the same size."""
    groups = line.partition("replica_groups=")[2]
    if mesh := re.match(r"\S*mesh\[(.*?)\].*?\{(.*?)\}", groups):  # mesh['a'=2,'b'=4] {'a','b':(1)2}
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return prod(int(size or sizes[axis]) for axis, size in axes)
    if iota := re.match(r"\[(?:\d+,)*(\d+)\]<=", groups):  # [2,4]<=[8], [4,2]<=[2,4]T(1,0): groups, devices a group
        return int(iota[1])
    first = re.match(r"\{\{([\d,]*)\}", groups)  # {{0,1},{2,3}}; {} or nothing: all devices
    return len(first[1].split(",")) if first else n_devices
