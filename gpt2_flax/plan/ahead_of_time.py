"""Compile the real training step for devices that may be absent: how much memory it needs, and what makes it fit."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_flax.config.parse import parse_config
from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.data.packing import Batch
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.parallel.auto_mesh import choose_mesh
from gpt2_flax.parallel.devices import Device, memory_bytes
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.parallel.rules import batch_sharding
from gpt2_flax.plan.collectives import Collective, collectives
from gpt2_flax.plan.estimate import bytes_on_a_device
from gpt2_flax.training.choices import choices
from gpt2_flax.training.open_stage import check_rows
from gpt2_flax.training.step import TrainState, make_train_step, state_layout

Note = Callable[[str], AbstractContextManager]
"""Makes a context that shows what runs while it is open."""

_QUICK = {"optimization_level": 9}  # XLA's effort level O0; the default is about O2
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REMAT = ("none", "selected", "full")
_USABLE = 0.75  # share of a GPU's memory that JAX takes by default, see XLA_PYTHON_CLIENT_MEM_FRACTION


@dataclass(frozen=True)
class Compiled:
    """A compiled training step; sizes are bytes on each device."""

    mesh: MeshSizes
    why: str
    """The reason for the mesh."""
    choices: Mapping[str, str]
    """See `training.choices`."""
    seconds: float
    arguments: int
    """State and batch."""
    temporaries: int
    available: float | None
    """Memory of a device, or None if it is not known."""
    collectives: Mapping[str, Collective] | None
    """Collectives of one step; None if the compiler rejected the program for its memory."""

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries

    @property
    def fits(self) -> bool:
        return self.collectives is not None and (self.available is None or self.total <= self.available)


@dataclass(frozen=True)
class Change:
    """Overrides `section.key=value` of a config, and the step compiled with them."""

    keys: tuple[str, ...]
    compiled: Compiled


def lower_step(config: ResolvedConfig, mesh: Mesh) -> jax.stages.Lowered:
    """Trace the training step for the devices of a mesh.

    Raises:
        UserError: USAGE, when the program calls cuDNN and cuDNN is not installed.
    """
    layout, batch = _arguments(config, mesh)
    with jax.set_mesh(mesh):
        try:
            return make_train_step(config, layout, mesh).lower(layout, batch)
        except RuntimeError as error:
            if "cuDNN" not in str(error):
                raise
            fix = "install it with `pip install 'gpt2_flax[cuda]'`, or set model.attention = xla; no GPU is needed"
            raise UserError(ExitCode.USAGE, "the program calls cuDNN, which is not installed", "cuDNN", fix) from None


def compile_step(config: ResolvedConfig, devices: Sequence[Device], optimize: bool = False) -> Compiled:
    """Compile the training step for devices that may be absent; with all optimizations, this takes minutes.

    Raises:
        UserError: CONFIG when the mesh does not suit the devices or the batch, USAGE like `lower_step`.
    """
    sizes, why = choose_mesh(config, devices)
    mesh = make_mesh(sizes, devices)
    check_rows(config, mesh)
    start = time.perf_counter()
    lowered = lower_step(config, mesh)
    arguments = bytes_on_a_device(_arguments(config, mesh))
    executable, rejected = None, 0
    try:
        executable = lowered.compile(None if optimize else _QUICK)  # pyright: ignore[reportArgumentType] - XLA takes ints
    except jax.errors.JaxRuntimeError as error:
        rejected = bytes_refused(str(error), arguments)
    seconds, chosen = time.perf_counter() - start, choices(config, mesh)
    result = Compiled(sizes, why, chosen, seconds, arguments, rejected, memory_bytes(devices[0]), None)
    stats, hlo = (executable.memory_analysis(), executable.as_text()) if executable else (None, None)
    if stats is None or hlo is None:
        return result
    return replace(
        result,
        arguments=stats.argument_size_in_bytes,
        # The new state replaces the donated old state in memory; other outputs need more memory.
        temporaries=stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes,
        collectives=collectives(hlo),
    )


def _arguments(config: ResolvedConfig, mesh: Mesh) -> tuple[TrainState, Batch]:
    """Return the state and the batch of a step, as shapes with shardings."""
    shape = (config.data.global_batch_size, config.data.seq_length)
    rows_BT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
    return state_layout(config, mesh), Batch(*[rows_BT] * len(Batch._fields))


def smallest_change(config: ResolvedConfig, devices: Sequence[Device], optimize: bool, note: Note) -> Change | None:
    """Find the cheapest change of a config with which its step fits into memory.

    Tries first to recompute activations, then more microbatches, then to shard parameters over more devices. `note`
    shows each change that is tried. Returns None if no change is enough.
    """
    available = memory_bytes(devices[0])
    for keys, candidate in _candidates(config, devices):
        if available is not None and state_and_gradients(candidate, devices) > available:
            continue
        with note(f"trying {' '.join(keys)}"):
            compiled = compile_step(candidate, devices, optimize)
        if compiled.fits:
            return Change(keys, compiled)
    return None


def memory_fraction(devices: Sequence[Device], compiled: Compiled) -> float | None:
    """Return the XLA_PYTHON_CLIENT_MEM_FRACTION that a step needs, or None if the default suffices."""
    if devices[0].platform != "gpu" or compiled.available is None or compiled.total <= _USABLE * compiled.available:
        return None
    return 0.95


def _candidates(config: ResolvedConfig, devices: Sequence[Device]) -> Iterator[tuple[tuple[str, ...], ResolvedConfig]]:
    """Yield changes in the order of their cost: overrides `section.key=value`, and the config with them."""
    sizes, _ = choose_mesh(config, devices)
    n_rows, microbatches = config.data.global_batch_size, config.training.accumulation_steps
    remats = [{"model.remat": remat} for remat in _REMAT[_REMAT.index(config.model.remat) + 1 :]]
    strongest = remats[-1] if remats else {}
    more_microbatches = [microbatches * 2**power for power in range(1, (n_rows // microbatches).bit_length())]
    on_one_mesh = remats + [strongest | {"training.accumulation_steps": count} for count in more_microbatches]
    more_fsdp = [sizes.fsdp * 2**power for power in range(1, (len(devices) // sizes.fsdp).bit_length())]
    for fsdp in (sizes.fsdp, *more_fsdp):
        mesh = MeshSizes(len(devices) // (fsdp * sizes.tensor), fsdp, sizes.tensor)
        if fsdp == sizes.fsdp:
            mesh_changes, combinations = {}, on_one_mesh
        else:
            mesh_changes = {"mesh.fsdp": fsdp} | ({"mesh.data": mesh.data} if config.mesh.data != -1 else {})
            combinations = [{}, *on_one_mesh]
        for combination in combinations:
            if (candidate := _changed(config, mesh, combination, devices)) is not None:
                yield tuple(f"{key}={value}" for key, value in (combination | mesh_changes).items()), candidate


def _changed(
    config: ResolvedConfig, mesh: MeshSizes, changes: Mapping[str, str | int], devices: Sequence[Device]
) -> ResolvedConfig | None:
    """Return the config with these changes and this mesh, or None if its rows or arrays do not split evenly."""
    values = config.model_dump(exclude_none=True) | {"mesh": mesh._asdict()}
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    try:
        candidate = parse_config(values, "config").with_vocab_size(config.model.vocab_size)
        check_rows(candidate, make_mesh(mesh, devices))
        state_layout(candidate, make_mesh(mesh, devices))
    except UserError:
        return None
    return candidate


def state_and_gradients(config: ResolvedConfig, devices: Sequence[Device]) -> int:
    layout = state_layout(config, make_mesh(choose_mesh(config, devices)[0], devices))
    return bytes_on_a_device(layout) + bytes_on_a_device(layout.model)


def bytes_refused(message: str, arguments: int) -> int:
    """Parse the temporary-buffer size, in bytes, from XLA's out-of-memory message.

    Raises:
        RuntimeError: when the message is about another error.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        raise RuntimeError(message)
    if found := re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", message):
        return round(float(found[1]) * _UNITS[found[2]])
    if found := re.search(r"Used ([\d.]+)([KMGT]?) of", message):
        return max(0, round(float(found[1]) * _UNITS[found[2]]) - arguments)
    return 0
