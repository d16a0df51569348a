"""The figures of `gpt2-flax plan --json`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from gpt2_flax.config.schema import Config
from gpt2_flax.parallel.devices import Device, memory_bytes, peak_flops
from gpt2_flax.plan.ahead_of_time import compile_step
from gpt2_flax.plan.estimate import (
    as_many_as_configured,
    checkpoint_bytes,
    figures,
    memory,
    mesh_sizes,
    read_datasets,
)


def plan_values(
    config: Config, devices: Sequence[Device], mfu: float, topology: str | None = None, optimize: bool = False
) -> dict[str, Any]:
    """Return the figures of `report.plan_lines` as JSON can hold them; arguments and errors as there.

    Sizes are bytes. `memory` is of one device. It is an estimate by parts, or what the compiler says of the step that
    was compiled for `topology`; its `available` and the `days` are None where they are not known.
    """
    resolved, mixture = read_datasets(config)
    counts = figures(resolved, mixture)
    if topology is None:
        devices, _ = as_many_as_configured(resolved, devices)
        sizes, _ = mesh_sizes(resolved, devices)
        estimate = memory(resolved, sizes)
        on_device = {**asdict(estimate), "total": estimate.total, "available": memory_bytes(devices[0])}
    else:
        compiled = compile_step(resolved, devices, optimize)
        sizes = compiled.mesh
        names = ("arguments", "temporaries", "total", "available", "fits")
        on_device = {name: getattr(compiled, name) for name in names}
    peak = peak_flops(devices[0].device_kind, resolved.model.dtype)
    return {
        "output": resolved.output,
        **asdict(counts),
        "tokens": counts.tokens,
        "checkpoint_bytes": checkpoint_bytes(resolved),
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "peak_flops": peak},
        "mesh": sizes._asdict(),
        "memory": on_device,
        "mfu": mfu,
        "days": None if peak is None else counts.days(peak * len(devices), mfu),
    }
