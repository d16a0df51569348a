"""What a compiled program sends between devices, read from its text (`compiled.as_text()`).

The text is that of XLA's optimised HLO for CPU, GPU or TPU: one computation after another, one instruction a line.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

from gpt2_flax.plan.hlo import bytes_of, callees, computations, elements

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# A collective that runs in the background is a pair of -start and -done; the start alone is counted.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")


@dataclass(frozen=True)
class Collective:
    """How often a device takes part in one kind of collective, and what it sends in all of them on a ring."""

    count: int
    bytes_sent: int


def collectives(hlo: str, overlapped: bool = False) -> dict[str, Collective]:
    """Returns those of KINDS that the program runs, loops unrolled.

    What happens in a loop counts as often as the loop runs, or once where that is not written down (a `lax.scan` is, a
    `lax.while_loop` is not). Of a conditional all branches count. A collective of a device with itself is none.
    overlapped: Count only the collectives that run in the background of a matrix product.
    """
    within = computations(hlo)
    n_devices = prod(int(n) for n in re.findall(r"\b(?:replica_count|num_partitions)=(\d+)", hlo.split("\n", 1)[0]))

    @cache
    def run(name: str) -> dict[str, Collective]:
        total = defaultdict(lambda: Collective(0, 0))
        lines = within.get(name, ())
        for number, line in enumerate(lines):
            parts = [(times, run(callee)) for callee, times in callees(line, within)]
            found = _COLLECTIVE.search(line)
            if found and overlapped and not (found[3] and any(map(multiplies, _until_done(lines[number:])))):
                found = None
            if found and (sent := _bytes_sent(found, n_devices)):
                # A TPU's compiler writes a reduce-scatter as an all-reduce and a slice, fused.
                fused = found[2] == "all-reduce" and name.startswith("all-reduce-scatter")
                parts.append((1, {"reduce-scatter" if fused else found[2]: Collective(1, sent // (2 if fused else 1))}))
            for times, part in parts:
                for kind, one in part.items():
                    count, bytes_sent = (
                        total[kind].count + times * one.count,
                        total[kind].bytes_sent + times * one.bytes_sent,
                    )
                    total[kind] = Collective(count, bytes_sent)
        return dict(total)

    @cache
    def multiplies(line: str) -> bool:
        """Whether an instruction runs a matrix product: a library's or, in what it calls, the compiler's own."""
        called = (inner for callee, _ in callees(line, within) for inner in within.get(callee, ()))
        return " dot(" in line or "__cublas" in line or any(map(multiplies, called))

    return run("ENTRY")


def _until_done(lines: Sequence[str]) -> Iterator[str]:
    """Yields what a scheduled program runs between the -start that comes first in `lines` and its -done."""
    start = lines[0].partition(" = ")[0].strip().removeprefix("ROOT ").lstrip("%")
    done = re.compile(rf"-done\(.*?%?{re.escape(start)}\)")
    return itertools.takewhile(lambda line: not done.search(line), lines[1:])


def _bytes_sent(found: re.Match, n_devices: int) -> int:
    """Returns what a device sends in the collective that `_COLLECTIVE` found."""
    shape, kind, start = found.groups()
    line = found.string
    size = bytes_of(_result(shape, kind) if start else shape)
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
    return shape if kind == "all-reduce" and not shape.startswith("((") else elements(shape)[1]


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
