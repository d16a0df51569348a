"""Check the training step on the first device: whether it repeats to the same bits, its speed, and which batch fits.

Dimension key: B rows, T sequence.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_flax.config.parse import parse_config
from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.cpu import tune_cpu
from gpt2_flax.data.packing import Batch
from gpt2_flax.doctor.rates import compute_dtype, product_rate, seconds_of
from gpt2_flax.doctor.report import Report
from gpt2_flax.memory import out_of_memory
from gpt2_flax.model.flops import flops_per_token
from gpt2_flax.parallel.device_batches import device_batch
from gpt2_flax.parallel.devices import memory_bytes, peak_flops, peak_memory
from gpt2_flax.parallel.mesh import make_mesh, platform
from gpt2_flax.training.step import TrainState, initial_state, make_train_step, state_layout

_VOCABULARY = 21128  # tokens of the published Chinese models
_REMATS = ("none", "selected", "full")
_STEPS = 3
_ROWS_OF_A_CPU = 4
_FIRST = 16  # rows of the first batch; then twice as many, or a quarter if the first batch does not fit
_SAFE = 0.9  # share of the memory that a suggested batch may take: other document lengths need other memory

Step = Callable[[TrainState, Batch], Any]


def determinism(report: Report) -> None:
    """Report whether steps from the same state and batch give the same bits, and a finite loss."""
    tune_cpu()  # as training does
    on_cpu = platform() == "cpu"
    # On a CPU this is the program of `speed`, so it is compiled once.
    config = _config(_ROWS_OF_A_CPU, _tiny()) if on_cpu else _config(8, {"n_layer": 2})
    forced = config.model_copy(update={"training": config.training.model_copy(update={"deterministic": True})})
    cases = [("as configured", config), ("training.deterministic", forced)]
    for case in report.affordable(cases[:1] if on_cpu else cases):
        differ, count, loss, skipped = differences(case)
        text = "the same bits" if differ == 0 else f"{differ:,} of {count:,} parameters differ"
        name = f"{_STEPS} steps twice" + ("" if case is config else ", training.deterministic")
        report.line(name, f"{text}, loss {loss:.4f}", differ=differ, parameters=count, loss=loss)
        if not np.isfinite(loss) or skipped:
            report.wrong(f"the loss or a gradient of a fresh model is not finite (loss {loss}): report this")
        if differ and on_cpu:
            report.wrong("the same steps on this CPU end in other bits: test its memory, and report this")
        elif differ and case is forced:
            report.wrong("with training.deterministic the same steps end in other bits: report this")


def differences(config: ResolvedConfig) -> tuple[int, int, float, int]:
    """Run the same steps twice; return how many parameters differ, their number, the loss, and the skipped steps."""
    with jax.set_mesh(_mesh()):
        step, state, batch = prepared(config)
        start = jax.tree.map(np.asarray, state)
        shardings = jax.tree.map(lambda array: array.sharding, state)
        ends = []
        for _ in range(2):
            state = jax.tree.map(jax.device_put, start, shardings)
            for _ in range(_STEPS - 1):
                state, _ = step(state, batch)
            state, metrics = step(state, batch)
            ends.append(([np.asarray(leaf) for leaf in jax.tree.leaves(state.model)], metrics))
    (first, _), (second, metrics) = ends
    differ = sum(
        int((one.view(np.uint32) != other.view(np.uint32)).sum()) for one, other in zip(first, second, strict=True)
    )
    return differ, sum(leaf.size for leaf in first), float(metrics.loss), int(metrics.skipped)


def speed(report: Report) -> None:
    """Report tokens a second, MFU and memory of the default recipe, and the best batch and remat for the device."""
    tune_cpu()  # as training does
    on_cpu, length, device = platform() == "cpu", _length(), jax.local_devices()[0]
    if on_cpu:
        report.line("model", "a tiny one, since this is a CPU")
    product, peak = product_rate(), peak_flops(device.device_kind, compute_dtype())
    measured: dict[int, tuple[str, float, float | None]] = {}  # by number of rows: remat, tokens/s, bytes
    batches = [_ROWS_OF_A_CPU if on_cpu else _FIRST]
    for rows in report.affordable((f"{rows} x {length}", rows) for rows in batches):
        for remat in _REMATS:
            config = _config(rows, (_tiny() if on_cpu else {}) | {"remat": remat})
            name = f"{rows} x {length}" + ("" if remat == "none" else f", remat {remat}")
            try:
                seconds, compiling = step_seconds(config)
            except Exception as error:
                if (failure := out_of_memory(error, "", "")) is None:
                    raise
                report.line(name, f"does not fit: {failure.what}", fits=False)
                continue
            rate = rows * length / seconds
            flops, memory = rate * flops_per_token(config.model, length), peak_memory([device])
            text = f"{rate:,.0f} tokens/s, {flops / product:.0%} of the product rate"
            text += f", MFU {flops / peak:.1%}" if peak else ""
            text += f", {memory / 2**30:.1f} GiB at most" if memory else ""
            values = {"rows": rows, "remat": remat, "tokens_a_second": rate, "seconds": seconds, "memory": memory}
            values |= {"mfu": flops / peak if peak else None, "of_product_rate": flops / product}
            report.line(name, f"{text}, compiled in {compiling:.0f} s", **values)
            measured[rows] = remat, rate, memory
            break
        if rows == _FIRST:
            batches.append(2 * rows if measured else rows // 4)
    if not on_cpu:
        report.line("suggestion", suggestion(measured, memory_bytes(device)))


def suggestion(measured: dict[int, tuple[str, float, float | None]], available: float | None) -> str:
    """Suggest the rows of a batch and `model.remat`.

    Args:
        measured: remat, tokens/s and peak bytes, by the number of rows.
        available: bytes of memory of the device, if known.
    """
    if not measured:
        return "a smaller batch or model: nothing tried fits"
    rows, (remat, rate, _) = max(measured.items(), key=lambda item: item[1][1])
    text = f"{rows} rows of {_length()} a device at a time with model.remat={remat}"
    if len(measured) > 1:
        fewest = min(measured)
        few_remat, few_rate, few_memory = measured[fewest]
        if rows > fewest and rate < 1.02 * few_rate:
            text += f" (no faster than {fewest})"
        most = max(measured)
        most_remat, _, most_memory = measured[most]
        if available and few_memory and most_memory and few_remat == most_remat and most_memory > few_memory:
            a_row = (most_memory - few_memory) / (most - fewest)
            fit = int(most + max(0, _SAFE * available - most_memory) / a_row) // 8 * 8
            text += f"; about {fit} rows fit" if fit > most else ""
    return f"{text}; for larger batches raise training.accumulation_steps"


def step_seconds(config: ResolvedConfig) -> tuple[float, float]:
    """Return the seconds of a step, in the fastest of three rounds, and the seconds until the first step was done."""
    start = time.perf_counter()
    with jax.set_mesh(_mesh()):
        step, state, batch = prepared(config)

        def run():
            nonlocal state
            state, metrics = step(state, batch)
            return metrics

        jax.block_until_ready(run())
        compiling = time.perf_counter() - start
        return seconds_of(run, times=_STEPS), compiling


def _mesh() -> Mesh:
    return make_mesh(devices=jax.local_devices()[:1])


def prepared(config: ResolvedConfig) -> tuple[Step, TrainState, Batch]:
    mesh = _mesh()
    layout = state_layout(config, mesh)
    rows = config.data.global_batch_size
    batch = device_batch(mesh, rows, lambda first, last: Batch(*(x_BT[first:last] for x_BT in _batch(config))))
    return make_train_step(config, layout, mesh), initial_state(config, layout), batch


def _batch(config: ResolvedConfig) -> Batch:
    """Return packed documents with lengths as in Chinese news and comments: most short, some longer than a row."""
    generator = np.random.default_rng(0)
    n_rows, length = config.data.global_batch_size, config.data.seq_length
    tokens_BT = generator.integers(5, config.model.vocab_size, (n_rows, length + 1)).astype(np.int32)
    starts_BT = generator.random((n_rows, length)) < 1 / 265  # the mean length is 265 tokens
    starts_BT[:, 0] = True
    segments_BT = starts_BT.cumsum(1).astype(np.int32)
    places_BT = np.broadcast_to(np.arange(length), (n_rows, length))
    positions_BT = places_BT - np.maximum.accumulate(np.where(starts_BT, places_BT, 0), 1)
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], segments_BT, positions_BT.astype(np.int32))


def _config(rows: int, model: dict[str, Any]) -> ResolvedConfig:
    """Return the default recipe for one device, with other keys of the model."""
    values = {
        "output": "none",
        "model": {"vocab_size": _VOCABULARY, "dtype": compute_dtype(), "n_positions": _length()} | model,
        "data": {"dataset": "none", "seq_length": _length(), "global_batch_size": rows},
        "training": {"total_steps": 1000},
    }
    return parse_config(values, "gpt2-flax doctor").with_vocab_size(values["model"]["vocab_size"])


def _tiny() -> dict[str, int]:
    return {"vocab_size": 512, "n_layer": 2, "n_embd": 64, "n_head": 2}


def _length() -> int:
    return 128 if platform() == "cpu" else 1024
