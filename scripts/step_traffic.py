"""Sum the memory traffic of a training step that is compiled for an accelerator, without the accelerator.

Every kernel of the optimized program counts the bytes that it reads and writes, as often as its loop runs. Caches do
not count. A kernel that reads slices of an array counts the slices; a kernel that updates a slice in place counts the
slice. The time is an estimate: bytes divided by the bandwidth of the data sheet. Products are bound by arithmetic and
take longer.

    python scripts/step_traffic.py --topology h200:1 --shape 32x1024
    python scripts/step_traffic.py --topology h200:1 --shape 32x1024 --options model.layers=scanned \
        --variant "no dropout" model.attn_pdrop=0 --variant unrolled model.layers=unrolled    # before and after
    python scripts/step_traffic.py --hlo program.txt --topology h200:1

--options apply to all variants. Without --variant there is one variant: AdamW, dropout and documents.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from benchmark_train import SIZES, Task, config_of, shape

from gpt2_flax.plan.hlo import bytes_of, callees, computations, elements

GROUPS = (
    "attention",
    "products of layers",
    "products of the loss",
    "elementwise of layers",
    "elementwise of the loss",
    "optimizer",
    "collectives",
    "copies",
)
COLLECTIVES = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?")
# These run nothing: names, views, or the end of an instruction that was counted at its start.
FREE = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all", "partition-id", "replica-id"}
FREE |= {"opt-barrier", "add-dependency", "domain"}
RUNS_OTHERS = {"while", "conditional", "call", "async-start"}
SLICES = {"dynamic-slice", "slice", "gather"}
MOVES = FREE | SLICES | {"copy", "copy-start", "transpose", "reshape", "concatenate", "pad", "dynamic-update-slice"}
MOVES |= {"broadcast", "iota", "convert"}
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)")


class Instruction(NamedTuple):
    """One line of a computation, such as `%sum = f32[4]{0} add(%a, %b), metadata=...`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    """Names of the operands."""
    attributes: str
    """The text after the operands."""
    is_root: bool
    """Whether the instruction is the result of its computation."""


class Kernel(NamedTuple):
    """An instruction that runs on a device: launches in a step, total bytes, and group."""

    launches: int
    bytes: int
    group: str


def instruction(line: str) -> Instruction | None:
    """Parse a line of a computation; return None if the line is no instruction."""
    if not (found := INSTRUCTION.match(line)):
        return None
    root, name, shape, opcode, rest = found.groups()
    depth = end = 0
    for end, character in enumerate(rest):  # noqa: B007 - ends at the parenthesis that closes the operands
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
    operands = re.findall(r"%([\w.\-]+)", rest[:end]) or re.findall(r"([\w.\-]+)(?:,|$)", rest[:end])
    return Instruction(name, shape, opcode, tuple(operands), rest[end + 1 :], bool(root))


class Program:
    """A compiled program, read from its text."""

    def __init__(self, hlo: str) -> None:
        self._hlo, self._within = hlo, computations(hlo)

    def kernels(self) -> Iterator[Kernel]:
        """Yield the kernels of a step."""
        yield from self._kernels("ENTRY", 1)

    def _kernels(self, name: str, times: int) -> Iterator[Kernel]:
        shapes = {one.name: one.shape for one in self._instructions(name)}
        for one in self._instructions(name):
            if one.opcode in RUNS_OTHERS:
                for callee, trips in callees(f" = {one.opcode}( {one.attributes}", self._within):
                    yield from self._kernels(callee, times * trips)
            elif one.opcode not in FREE and not one.opcode.endswith("-done"):
                yield Kernel(times, times * self._traffic(one, shapes), self._group(one))

    @cache  # noqa: B019 - a program lives as long as this process
    def _instructions(self, name: str) -> list[Instruction]:
        return [one for line in self._within.get(name, ()) if (one := instruction(line))]

    def _fused(self, one: Instruction) -> list[Instruction]:
        called = re.search(r"\bcalls=%?([\w.\-]+)", one.attributes) if one.opcode == "fusion" else None
        return self._instructions(called[1]) if called else []

    def _traffic(self, one: Instruction, shapes: dict[str, str]) -> int:
        """Return the bytes that a kernel reads and writes."""
        if fused := self._fused(one):
            return _read_in(fused) + _written_in(fused)
        result, operands = bytes_of(_without_workspace(one)), [bytes_of(shapes.get(name, "")) for name in one.operands]
        if one.opcode == "custom-call":  # a library's kernel or ours: an array that is passed twice is read once
            return result + _read_by_kernel(one, shapes)
        if one.opcode in SLICES:
            return 2 * result + sum(operands[1:])
        if one.opcode == "dynamic-update-slice":
            return 2 * operands[1]
        if one.opcode == "scatter":
            return 3 * operands[2] + operands[1]
        if one.opcode.endswith("-start"):  # most of these shapes list operands as well as results
            results = elements(one.shape)
            result = bytes_of(results[0 if len(results) == 1 or one.opcode == "copy-start" else 1])
        return result + sum(operands)

    def _group(self, one: Instruction) -> str:
        if COLLECTIVES.fullmatch(one.opcode):
            return "collectives"
        fused = self._fused(one)
        # Scalars do not count: they are the positions of slices.
        if {inner.opcode for inner in fused or [one] if "[]" not in inner.shape} <= MOVES:
            return "copies"
        frames = self._frames(one)
        modules = [frame.module for frame in frames]
        of_attention = {"attention", "flash", "flash_triton"} & set(modules)
        if of_attention or re.search(r"cudnn|xla\.gpu\.triton", one.attributes):
            return "attention"
        if "optimizer" in modules or any("optax" in frame.path for frame in frames) or modules[:1] == ["step"]:
            return "optimizer"
        whose = "of the loss" if "loss" in modules else "of layers"
        return f"{'products' if self._multiplies(one) else 'elementwise'} {whose}"

    def _multiplies(self, one: Instruction) -> bool:
        return one.opcode == "dot" or "__cublas" in one.attributes or any(map(self._multiplies, self._fused(one)))

    def _frames(self, one: Instruction) -> tuple["Frame", ...]:
        """Return the Python calls that traced an instruction, the innermost call first."""
        number = re.search(r"stack_frame_id=(\d+)", one.attributes)
        found, number = [], int(number[1]) if number else 0
        while number in self._stacks:
            frame, number = self._stacks[number]
            found.append(frame)
        return tuple(found)

    @cached_property
    def _stacks(self) -> dict[int, tuple["Frame", int]]:
        """Return each frame and the number of its caller, by the number of the frame."""
        files = dict(re.findall(r'^(\d+) "(.*)"$', _table(self._hlo, "FileNames"), re.M))
        functions = dict(re.findall(r'^(\d+) "(.*)"$', _table(self._hlo, "FunctionNames"), re.M))
        places = re.findall(
            r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+)", _table(self._hlo, "FileLocations"), re.M
        )
        frames = {
            place: Frame(files[file], Path(files[file]).stem, functions[function].partition(".")[0])
            for place, file, function in places
        }
        stacks = re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", re.M)
        found = stacks.findall(_table(self._hlo, "StackFrames"))
        # The text numbers parents one higher than frames: parent 1 means none.
        return {int(number): (frames[place], int(parent or 1) - 1) for number, place, parent in found}


class Frame(NamedTuple):
    """A call on the Python stack that traced an instruction."""

    path: str
    module: str
    function: str


def _table(hlo: str, name: str) -> str:
    return hlo.partition(f"\n{name}\n")[2].partition("\n\n")[0]


def _without_workspace(one: Instruction) -> str:
    """Return the shape of a kernel's results, without the scratch memory that libraries get as one more result."""
    if one.opcode != "custom-call":
        return one.shape
    first, *others = elements(one.shape)
    return " ".join([first, *(shape for shape in others if not re.match(r"\s*[su]8\[", shape))])


def _read_by_kernel(one: Instruction, shapes: dict[str, str]) -> int:
    """Return the bytes that a kernel of a library or of ours reads; a result may replace an array that is not read."""
    aliases = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", one.attributes)
    replaced = set(map(int, re.findall(r": \((\d+),", aliases[1]))) if aliases else set()
    read = {name for place, name in enumerate(one.operands) if place not in replaced}
    return sum(bytes_of(shapes.get(name, "")) for name in read)


def _read_in(fused: list[Instruction]) -> int:
    """Return the bytes that a fused kernel reads from its parameters."""
    users = defaultdict(list)
    for one in fused:
        for place, name in enumerate(one.operands):
            users[name].append((one, place))

    def read(name: str, whole: int) -> int:
        total_bytes = 0
        for user, place in users[name]:
            if user.opcode == "bitcast":
                total_bytes += read(user.name, whole)
            elif user.opcode in SLICES and place == 0:
                total_bytes += bytes_of(user.shape)
            elif user.opcode in ("dynamic-update-slice", "scatter") and place == 0:
                # These update in place, but a scatter also reads the numbers to which it adds.
                total_bytes += bytes_of(by_name[user.operands[2]].shape) if user.opcode == "scatter" else 0
            else:
                return whole
        return min(total_bytes, whole)

    by_name = {one.name: one for one in fused}
    return sum(read(one.name, bytes_of(one.shape)) for one in fused if one.opcode == "parameter")


def _written_in(fused: list[Instruction]) -> int:
    """Return the bytes that a fused kernel writes."""
    by_name = {one.name: one for one in fused}

    def written(one: Instruction) -> int:
        if one.opcode == "tuple":
            return sum(written(by_name[name]) for name in one.operands)
        if one.opcode == "bitcast":
            return written(by_name[one.operands[0]])
        if one.opcode == "dynamic-update-slice":
            return bytes_of(by_name[one.operands[1]].shape)
        if one.opcode == "scatter" and _source(by_name[one.operands[0]], by_name).opcode == "parameter":
            return bytes_of(by_name[one.operands[2]].shape)
        return bytes_of(one.shape)

    return sum(written(one) for one in fused if one.is_root)


def _source(one: Instruction, by_name: dict[str, Instruction]) -> Instruction:
    return _source(by_name[one.operands[0]], by_name) if one.opcode == "bitcast" else one


class Total(NamedTuple):
    """Launches and bytes of a variant by group, and its peak memory in bytes (None if read from a text)."""

    groups: dict[str, tuple[int, int]]
    memory: int | None


def total(hlo: str, memory: int | None = None) -> Total:
    """Sum the kernels of a program."""
    groups = dict.fromkeys(GROUPS, (0, 0))
    for kernel in Program(hlo).kernels():
        launches, size = groups[kernel.group]
        groups[kernel.group] = launches + kernel.launches, size + kernel.bytes
    return Total(groups, memory)


def table(totals: dict[str, Total], bandwidth: int | None) -> Iterator[str]:
    """Yield the lines of a table: the groups below one another, the variants side by side."""
    width = max(26, *(len(name) + 2 for name in totals))
    yield f"{'':26}" + "".join(f"{name:>{width}}" for name in totals)
    yield f"{'':26}" + "".join(f"{'launches':>{width - 12}}{'GB':>12}" for _ in totals)

    def line(name: str, cells: Iterator[tuple[int, int]]) -> str:
        return f"{name:26}" + "".join(f"{count:>{width - 12},}{size / 1e9:>12,.2f}" for count, size in cells)

    for group in GROUPS:
        if any(found.groups[group][0] for found in totals.values()):
            yield line(group, (found.groups[group] for found in totals.values()))
    sums = [tuple(map(sum, zip(*found.groups.values(), strict=True))) for found in totals.values()]
    yield line("all", iter(sums))
    if bandwidth:
        times = (f"{1e3 * size / bandwidth:>{width},.1f}" for _, size in sums)
        yield f"{f'ms at {bandwidth / 1e12:.2f} TB/s':26}" + "".join(times)
    if all(found.memory for found in totals.values()):
        yield f"{'GiB of temporaries':26}" + "".join(
            f"{found.memory / 2**30:>{width},.2f}" for found in totals.values()
        )


def compiled(args: argparse.Namespace, options: list[str]) -> Total:
    from gpt2_flax.parallel.auto_mesh import choose_mesh
    from gpt2_flax.parallel.mesh import make_mesh
    from gpt2_flax.plan.ahead_of_time import lower_step
    from gpt2_flax.plan.topology import devices_for

    rows, length = args.shape
    devices = devices_for(args.topology)
    task = ("gpt2_flax dropout", args.size, rows * len(devices), length, args.vocab_size, "bfloat16", 0)
    config = config_of(Task(*task, (*args.options, *options)))
    program = lower_step(config, make_mesh(choose_mesh(config, devices)[0], devices)).compile()
    return total(program.as_text(), program.memory_analysis().temp_size_in_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="h200:1", help="as in gpt2-flax plan (default: %(default)s)")
    parser.add_argument("--shape", type=shape, default=(32, 1024), help="ROWSxLENGTH of each device (default: 32x1024)")
    parser.add_argument("--size", default="base", choices=SIZES, help="size of the model (default: base)")
    parser.add_argument("--vocab-size", type=int, default=21128, help="(default: %(default)s)")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="config keys of this package")
    parser.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"), help="repeatable"
    )
    parser.add_argument("--hlo", nargs="+", type=Path, default=[], help="read texts of compiled programs instead")
    args = parser.parse_args()
    from gpt2_flax.parallel.devices import bandwidth
    from gpt2_flax.plan.topology import devices_for

    totals = {path.stem: total(path.read_text(encoding="utf-8")) for path in args.hlo}
    if not args.hlo:
        for name, *options in args.variant or [["default"]]:
            totals[name] = compiled(args, [*args.options, *options])
    for line in table(totals, bandwidth(devices_for(args.topology)[0].device_kind)):
        print(line)


if __name__ == "__main__":
    main()
