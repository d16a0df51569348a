"""Measure products, memory and collectives of the devices, and compare the rates with the data sheet.

Dimension key: N side of a square matrix, M numbers of a long array, E devices.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.cpu import tune_cpu
from gpt2_flax.doctor.report import Report
from gpt2_flax.parallel.devices import bandwidth, memory_bytes, peak_flops
from gpt2_flax.parallel.mesh import platform
from gpt2_flax.progress import si

_LOW = 0.3  # share of the data sheet's rate below which a device is at fault; 0.5 to 0.95 is usual


def rates(report: Report) -> None:
    """Report the rate of matrix products and the memory bandwidth of the first device."""
    tune_cpu()  # as training does
    kind, dtype = jax.local_devices()[0].device_kind, compute_dtype()
    for name, unit, measured, promised in (
        (f"{dtype} product", "FLOP", product_rate(), peak_flops(kind, dtype)),
        ("memory", "B", memory_rate(), bandwidth(kind)),
    ):
        text = f"{si(measured, unit)}/s"
        if promised:
            text += f", {measured / promised:.0%} of the data sheet's {si(promised, unit)}/s"
        report.line(name, text, measured=measured, data_sheet=promised)
        if promised and measured < _LOW * promised:
            report.wrong(
                f"the {name} rate is {measured / promised:.0%} of the data sheet's: look for other work on the device, "
                "its heat and its power limit (nvidia-smi -q -d PERFORMANCE)"
            )


def compute_dtype() -> str:
    """Return the dtype that training computes in: bfloat16, but float32 on CPUs, which emulate bfloat16."""
    return "float32" if platform() == "cpu" else "bfloat16"


def product_rate() -> float:
    """Return the FLOP/s of a large matrix product in `compute_dtype` on the first device."""
    n = 1024 if platform() == "cpu" else 8192
    x_NN = jnp.ones((n, n), compute_dtype())
    return 2 * n**3 / seconds_of(jax.jit(lambda x_NN: x_NN @ x_NN), x_NN)


def seconds_of(function: Callable, *arguments: jax.Array, times: int = 10) -> float:
    """Return the seconds of a call after compilation: the mean of `times` calls in the fastest of three rounds."""
    jax.block_until_ready(function(*arguments))
    rounds = []
    for _ in range(3):
        start, out = time.perf_counter(), None
        for _ in range(times):
            out = function(*arguments)
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / times)
    return min(rounds)


def memory_rate() -> float:
    available = memory_bytes(jax.local_devices()[0])
    size = 2**26 if platform() == "cpu" else int(min(2**30, (available or 2**33) / 8))
    x_M = jnp.ones(size // 4, jnp.float32)
    return 2 * 4 * x_M.size / seconds_of(jax.jit(lambda x_M: x_M + 1), x_M)  # each number is read and written


def collectives(report: Report) -> None:
    """Report whether collectives between the devices of this process give correct numbers, and how fast."""
    devices = jax.local_devices()
    n = len(devices)
    if n == 1:
        report.line("devices", "one: nothing to exchange")
        return
    mesh = Mesh(np.array(devices), ("devices",))
    large = 2**18 if platform() == "cpu" else 2**25  # numbers on each device
    for name in report.affordable((name, name) for name in EXCHANGES):
        exchange, layout = EXCHANGES[name]
        run = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=P("devices"), out_specs=layout, check_vma=False))
        x_EM = _distinct(n, 4 * n)
        out = run(jax.device_put(x_EM, NamedSharding(mesh, P("devices"))))
        expected = x_EM if name == "all-gather" else x_EM.sum(0, keepdims=True)
        bad = sum(not np.array_equal(shard.data, expected[shard.index]) for shard in out.addressable_shards)
        if bad:
            report.line(name, f"wrong on {bad} of {n} devices", right=False)
            report.wrong(f"{name} between {n} devices gives wrong numbers on {bad}: test the devices and their links")
            continue
        x_EM = jax.device_put(_distinct(n, large // n * n), NamedSharding(mesh, P("devices")))
        # The bytes that each device sends on a ring, as in NVIDIA's nccl-tests.
        sent = x_EM.nbytes / n * (n - 1) * {"all-reduce": 2 / n, "all-gather": 1, "reduce-scatter": 1 / n}[name]
        rate = sent / seconds_of(run, x_EM)
        report.line(name, f"right between {n} devices, {si(rate, 'B')}/s sent by each", right=True, bytes_a_second=rate)


EXCHANGES = {  # the collective of a device's row, and the layout of its results
    "all-reduce": (lambda row_1M: jax.lax.psum(row_1M, "devices"), P()),
    "all-gather": (lambda row_1M: jax.lax.all_gather(row_1M, "devices", tiled=True), P()),
    "reduce-scatter": (
        lambda row_1M: jax.lax.psum_scatter(row_1M, "devices", scatter_dimension=1, tiled=True),
        P(None, "devices"),
    ),
}


def _distinct(n_devices: int, size: int) -> np.ndarray:
    """Return float32 (E, M) that differ between devices and positions, and whose sums are exact."""
    return (np.arange(n_devices)[:, None] * 256 + np.arange(size) % 251).astype(np.float32)
