"""The report of `gpt2-flax plan`: what a run takes, before it costs anything."""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

from gpt2_flax.config.schema import Config, ResolvedConfig
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.parallel.auto_mesh import choose_mesh
from gpt2_flax.parallel.devices import Device, memory_bytes, peak_flops
from gpt2_flax.parallel.mesh import MeshSizes
from gpt2_flax.plan.ahead_of_time import Compiled, compile_step, memory_fraction, smallest_change
from gpt2_flax.plan.estimate import Figures, checkpoint_bytes, figures, memory, read_datasets
from gpt2_flax.progress import duration, si

_COLUMN = 24


def plan_lines(
    config: Config, devices: Sequence[Device], mfu: float, topology: str | None = None, optimize: bool = False
) -> Iterator[str]:
    """Yield the lines of the report.

    Args:
        config: config of a run; its datasets may be missing if it gives the vocabulary size.
        devices: devices of one kind.
        mfu: share of the devices' peak FLOP/s that training is assumed to reach.
        topology: name of the devices if they are absent; the training step is then compiled for them.
        optimize: whether to compile with all optimizations.

    Raises:
        UserError: CONFIG when the mesh does not suit the devices or the batch, or like `read_datasets`.
    """
    config, mixture = read_datasets(config)
    counts = figures(config, mixture)
    yield from _figure_lines(config, counts, mixture)
    if topology is None:
        devices, whose = _as_many_as_configured(config, devices)
        yield _line("devices", f"{_kind(devices)}, {whose}; for others: --topology")
        yield from _estimate_lines(config, devices)
    else:
        yield _line("devices", f"{topology}, {_kind(devices)}")
        yield from _compiled_lines(config, devices, optimize)
    yield from _duration_lines(config, counts, devices, mfu)


def _as_many_as_configured(config: ResolvedConfig, devices: Sequence[Device]) -> tuple[Sequence[Device], str]:
    """Return the devices of this machine, or as many of their kind as the mesh of the config needs."""
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    given = [size for size in sizes if size != "auto" and size != -1]
    count = math.prod(given)
    if len(devices) == count or (len(given) < len(sizes) and len(devices) % count == 0):
        return devices, "those of this machine"
    here = f"here {'is' if len(devices) == 1 else 'are'} {len(devices)}"
    return [devices[0]] * count, f"as the config's mesh has it; {here}"


def _kind(devices: Sequence[Device]) -> str:
    return f"{len(devices)} x {devices[0].device_kind}"


def _figure_lines(config: ResolvedConfig, counts: Figures, mixture: Mixture | None) -> Iterator[str]:
    embeddings, blocks = f"{counts.in_embeddings:,} in embeddings", f"{counts.in_blocks:,} in blocks"
    rows, length = config.data.global_batch_size, config.data.seq_length
    yield _line("parameters", f"{counts.parameters:,}: {embeddings}, {blocks}")
    yield _line("a token", f"{_flop(counts.flops_per_token)}, forward and backward")
    yield _line("a step", f"{counts.tokens_per_step:,} tokens: {rows:,} rows of {length:,}")
    yield _line("the run", f"{counts.tokens:,} tokens in {counts.steps:,} steps, {_flop(counts.flops)}")
    if counts.epochs is None or mixture is None:
        yield _line("epochs", "not known: a dataset is not there, " + ", ".join(config.data.datasets))
    else:
        for folder, epochs in counts.epochs.items():
            tokens = mixture.datasets[folder].train.n_tokens
            yield _line("epochs", f"{epochs:,.2f} of {tokens:,} tokens in {folder}")
    kept = config.training.keep_checkpoints + config.training.keep_best
    size = checkpoint_bytes(config)
    moments = "float32 parameters and moments"
    yield _line("a checkpoint", f"{_bytes(size)}, {moments}; up to {kept} kept, {_bytes(size * kept)}")


def _estimate_lines(config: ResolvedConfig, devices: Sequence[Device]) -> Iterator[str]:
    sizes, why = choose_mesh(config, devices)
    if sizes.data == -1:  # no mesh fits; `memory` raises the error
        sizes = sizes._replace(data=max(1, len(devices) // (sizes.fsdp * sizes.tensor)))
    bytes_of, available = memory(config, sizes), memory_bytes(devices[0])
    yield _mesh_line(sizes, why)
    yield _line("memory a device", f"about {_bytes(bytes_of.total)}{_of(available)}")
    yield _line("  parameters", _bytes(bytes_of.parameters))
    yield _line("  gradients", _bytes(bytes_of.gradients))
    yield _line("  optimizer", _bytes(bytes_of.optimizer))
    yield _line("  activations", f"{_bytes(bytes_of.activations)}, with model.remat = {config.model.remat}")
    yield _line("  loss", f"{_bytes(bytes_of.loss)}, the largest chunk of logits and its gradient")


def _compiled_lines(config: ResolvedConfig, devices: Sequence[Device], optimize: bool) -> Iterator[str]:
    with _note("compiling"):
        compiled = compile_step(config, devices, optimize)
    yield _mesh_line(compiled.mesh, compiled.why)
    for name, choice in compiled.choices.items():
        yield _line(name, choice)
    yield from _step_lines(compiled, optimize)
    if compiled.fits:
        known = compiled.available is not None
        verdict = "fits" + _with_fraction(devices, compiled) if known else "compiles; the device's memory is not known"
        yield _line("verdict", verdict)
        return
    change = smallest_change(config, devices, optimize, _note)
    if change is None:
        yield _line(
            "verdict", "does not fit; nothing tried makes it fit: use more or larger devices, or a smaller model"
        )
        return
    keys = " ".join(change.keys)
    yield _line("verdict", f"does not fit; it does with {keys}{_with_fraction(devices, change.compiled)}:")
    if change.compiled.mesh != compiled.mesh:
        yield _mesh_line(change.compiled.mesh, change.compiled.why)
    yield from _step_lines(change.compiled, optimize)


def _step_lines(compiled: Compiled, optimize: bool) -> Iterator[str]:
    how = "with all optimizations" if optimize else "quickly; with all optimizations: --optimize"
    yield _line("compiled", f"in {compiled.seconds:.0f} s, {how}")
    total, available = _bytes(compiled.total), _of(compiled.available)
    items = f"{_bytes(compiled.arguments)} state and batch, {_bytes(compiled.temporaries)} temporaries"
    if compiled.collectives is None:
        yield _line("memory a device", f"{total} or more{available}, says the compiler: {items}")
        return
    yield _line("memory a device", f"{total}{available}: {items}")
    for kind, found in compiled.collectives.items():
        times = "once" if found.count == 1 else f"{found.count:,} times"
        yield _line("sent a step", f"{kind} {times}, {_bytes(found.bytes_sent)} from a device")
    if not compiled.collectives:
        yield _line("sent a step", "nothing")


def _duration_lines(config: ResolvedConfig, counts: Figures, devices: Sequence[Device], mfu: float) -> Iterator[str]:
    peak = peak_flops(devices[0].device_kind, config.model.dtype)
    if peak is None:
        yield _line("time", f"not known: there is no peak of {devices[0].device_kind} in the table")
        return
    days = counts.days(peak * len(devices), mfu)
    span = f"{days:,.1f} days" if days >= 1 else duration(days * 86400)
    together = f"{len(devices)} x {_flop(peak)}/s"
    yield _line("time", f"{span} at {mfu:.0%} of {together}; the MFU is assumed, see --mfu")


def _mesh_line(sizes: MeshSizes, why: str) -> str:
    return _line("mesh", f"data {sizes.data} x fsdp {sizes.fsdp} x tensor {sizes.tensor}: {why}")


def _with_fraction(devices: Sequence[Device], compiled: Compiled) -> str:
    fraction = memory_fraction(devices, compiled)
    return "" if fraction is None else f", with XLA_PYTHON_CLIENT_MEM_FRACTION={fraction} in the environment"


def _note(doing: str) -> AbstractContextManager:
    """Show on stderr what takes so long, if stderr is a terminal."""
    return Console(stderr=True).status(doing) if sys.stderr.isatty() else nullcontext()


def _line(name: str, value: str) -> str:
    return f"{name:<{_COLUMN}}{value}"


def _of(available: float | None) -> str:
    return f" of {_bytes(available)}" if available else ""


def _bytes(size: float) -> str:
    return si(size, "B")


def _flop(count: float) -> str:
    for limit, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P")):
        if count >= limit:
            return f"{count / limit:.3g}{prefix} FLOP"
    return si(count, "FLOP")
