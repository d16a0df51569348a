"""Measure training steps of GPT-2 against `transformers` in PyTorch, on the same machine in one run.

Each variant runs in its own process, in turn, round after round, so that a slow phase of the machine affects all. All
variants do the same: forward, backward, clipping at norm 1 and AdamW for a batch of rows.

    gpt2_flax               this package, without dropout; attention crosses document borders, as in torch
    gpt2_flax documents     the same with attention inside documents, four in a row
    torch                   GPT2LMHeadModel, SDPA attention, fused AdamW, without dropout
    torch compiled          the same under torch.compile
    gpt2_flax dropout       dropout 0.1 in embedding, attention and residuals, four documents a row
    torch dropout           torch with the same dropout, without documents
    torch dropout compiled  the same under torch.compile

    tokens/s   of the median step (slowest to fastest round)
    TFLOP/s    arithmetic of the model in a step divided by the time of a step: 12 matrix products a layer and the head,
               attention over whole rows; recomputation does not count
    of peak    these TFLOP/s relative to a plain matrix product of the same type in the same run
    ours       tokens/s of gpt2_flax (with dropout: of gpt2_flax dropout) divided by tokens/s of the line

    python scripts/benchmark_train.py                                       # CPU: 124M, 4 x 128 and 1 x 1024, float32
    python scripts/benchmark_train.py --sizes base xlarge --shapes 32x1024 64x1024          # GPU: bfloat16
    python scripts/benchmark_train.py --sizes base xlarge --shapes 32x1024 --topology h200:1  # compiled, without a GPU
    python scripts/benchmark_train.py --scaling --options model.layers=scanned    # 1 to 8 simulated devices

On a GPU, if several shapes have the same length, the fastest one that fits into memory counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SIZES = {  # layers, width, heads
    "tiny": (2, 64, 2),
    "base": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xlarge": (48, 1600, 25),
}
VARIANTS = (
    *("gpt2_flax", "gpt2_flax documents", "torch", "torch compiled"),
    *("gpt2_flax dropout", "torch dropout", "torch dropout compiled"),
)
OURS = tuple(variant for variant in VARIANTS if variant.startswith("gpt2_flax"))


class Task(NamedTuple):
    """The measurement of one process."""

    variant: str
    size: str
    rows: int
    length: int
    vocab_size: int
    dtype: str
    steps: int
    options: tuple[str, ...]  # section.key=value, for this package


def measure(task: Task) -> dict[str, Any]:
    """Return the seconds of the median step, the FLOP/s of a matrix product, and the choices of a variant."""
    step, product, chosen = (jax_step if task.variant in OURS else torch_step)(task)
    step()  # compiles
    step()
    times = []
    for _ in range(task.steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "peak": peak(product), "choices": chosen}


def peak(product: Callable[[], float]) -> float:
    """Return the FLOP/s of the fastest of some products."""
    rates = []
    for _ in range(6):
        start = time.perf_counter()
        flops = product()
        rates.append(flops / (time.perf_counter() - start))
    return max(rates[1:])


def dropout_of(variant: str) -> float:
    return 0.1 if "dropout" in variant else 0.0


def config_of(task: Task) -> Any:
    import tomli_w

    from gpt2_flax.config.file import load_config

    n_layer, n_embd, n_head = SIZES[task.size]
    values = {
        "output": "none",
        "model": {
            **{"vocab_size": task.vocab_size, "n_positions": task.length, "dtype": task.dtype},
            **{"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head},
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout_of(task.variant)),
            "attend_across_documents": task.variant == "gpt2_flax",
        },
        "data": {"dataset": "none", "seq_length": task.length, "global_batch_size": task.rows},
        "optimizer": {"name": "adamw"},  # as in torch
        "training": {"total_steps": 10_000},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(tomli_w.dumps(values))
        file.flush()
        return load_config(Path(file.name), task.options).with_vocab_size(task.vocab_size)


def jax_step(task: Task) -> tuple[Callable[[], None], Callable[[], float], dict[str, str]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gpt2_flax.cpu import tune_cpu
    from gpt2_flax.data.packing import Batch
    from gpt2_flax.parallel.auto_mesh import choose_mesh
    from gpt2_flax.parallel.mesh import make_mesh
    from gpt2_flax.training.choices import choices
    from gpt2_flax.training.step import initial_state, make_train_step, state_layout

    tune_cpu()  # as `gpt2-flax train` does
    config = config_of(task)
    mesh = make_mesh(choose_mesh(config, jax.devices())[0])
    jax.set_mesh(mesh)
    layout = state_layout(config, mesh)
    tokens_BT = np.random.default_rng(0).integers(task.vocab_size, size=(task.rows, task.length + 1)).astype(np.int32)
    places_BT = np.broadcast_to(np.arange(task.length, dtype=np.int32), (task.rows, task.length))
    segments_BT = 1 + (0 * places_BT if config.model.attend_across_documents else 4 * places_BT // task.length)
    batch = Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], segments_BT, places_BT)
    train_step = make_train_step(config, layout, mesh)
    state = [initial_state(config, layout)]

    def step() -> None:
        state[0], metrics = train_step(state[0], batch)
        jax.block_until_ready((state[0], metrics))

    n = 8192 if jax.default_backend() != "cpu" else 2048
    x = jnp.ones((n, n), task.dtype)
    times = jax.jit(lambda x: x @ x)

    def product() -> float:
        jax.block_until_ready(times(x))
        return 2.0 * n**3

    return step, product, choices(config, mesh)


def torch_step(task: Task) -> tuple[Callable[[], None], Callable[[], float], dict[str, str]]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    n_layer, n_embd, n_head = SIZES[task.size]
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest" if task.dtype == "float32" else "high")
    config = GPT2Config(
        **{"vocab_size": task.vocab_size, "n_positions": task.length, "attn_implementation": "sdpa"},
        **{"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "use_cache": False},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout_of(task.variant)),
    )
    model = GPT2LMHeadModel(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens_BT = torch.randint(task.vocab_size, (task.rows, task.length), device=device)
    run = torch.compile(model) if task.variant.endswith("compiled") else model

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=task.dtype == "bfloat16"):
            loss = run(tokens_BT, labels=tokens_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device

    n = 8192 if device == "cuda" else 2048
    x = torch.ones((n, n), dtype=getattr(torch, task.dtype), device=device)

    def product() -> float:
        (x @ x)[0, 0].item()
        return 2.0 * n**3

    return step, product, {}


def run_in_new_process(task: Task) -> dict[str, Any] | None:
    """Measure in a new process; return None if it fails, for example without enough memory."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        print(f"  {task.variant} at {task.rows} x {task.length} failed: {last[0][:160]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, size: str, shapes: list[tuple[int, int]]) -> None:
    """Print the best of `shapes` for each variant; all shapes have the same length."""
    length = shapes[0][1]
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    failed = set()
    for _ in range(args.rounds):
        for variant in args.variants:
            for rows, _ in shapes:
                if (variant, rows) in failed:
                    continue
                task = Task(variant, size, rows, length, args.vocab_size, args.dtype, args.steps, tuple(args.options))
                result = run_in_new_process(task)
                if result is None:
                    failed.add((variant, rows))
                else:
                    found.setdefault((variant, rows), []).append(result)
    flops = model_flops(size, length, args.vocab_size)
    ceiling = max((result["peak"] for results in found.values() for result in results), default=float("nan"))
    wanted = " or ".join(f"{rows} x {length}" for rows, _ in shapes)
    print(
        f"\n{size}, {wanted}, {args.dtype}, vocabulary {args.vocab_size:,}; matrix product {ceiling / 1e12:.3f} TFLOP/s"
    )
    print(f"  {'':24}{'rows':>5}{'tokens/s':>12}{'':22}{'TFLOP/s':>10}{'of peak':>9}{'ours':>8}")
    speeds: dict[str, float] = {}
    lines = []
    for variant in args.variants:
        rates = {
            rows: [rows * length / result["seconds"] for result in results]
            for (name, rows), results in found.items()
            if name == variant
        }
        if not rates:
            continue
        rows, best = max(rates.items(), key=lambda item: statistics.median(item[1]))
        speeds[variant] = statistics.median(best)
        lines.append((variant, rows, best))
    for variant, rows, best in lines:
        rate = speeds[variant]
        ours = "gpt2_flax dropout" if dropout_of(variant) else "gpt2_flax"
        ratio = f"{speeds[ours] / rate:.2f}x" if ours in speeds else ""
        spread = f"({min(best):,.0f} to {max(best):,.0f})"
        done = rate * flops
        print(f"  {variant:24}{rows:5}{rate:12,.0f} {spread:21}{done / 1e12:10.3f}{done / ceiling:9.1%}{ratio:>8}")
        for name, choice in found[variant, rows][0]["choices"].items():
            print(f"    {name} {choice}")
    sys.stdout.flush()


def model_flops(size: str, length: int, vocab_size: int) -> int:
    from gpt2_flax.config.model import ModelConfig
    from gpt2_flax.model.flops import flops_per_token

    n_layer, n_embd, n_head = SIZES[size]
    model = ModelConfig(
        vocab_size=vocab_size, n_positions=length, n_layer=n_layer, n_embd=n_embd, n_head=n_head, attn_pdrop=0.0
    )
    return flops_per_token(model, length)


def scaling(args: argparse.Namespace) -> None:
    """Print the arithmetic and the communication of each device for 1 to 8 devices with the same rows on each."""
    import jax

    from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
    from gpt2_flax.plan.ahead_of_time import lower_step
    from gpt2_flax.plan.collectives import collectives

    size, (rows, length) = args.sizes[0], args.shapes[0]
    print(f"{size}, {rows} x {length} on each device, compiled for 1 to 8 devices that this CPU simulates")
    print(f"  {'mesh':>24}{'GFLOP a device':>16}{'of one':>9}   bytes each device sends in a step")
    alone = None
    for count in (1, 2, 4, 8):
        for axis in ("data", "fsdp") if count > 1 else ("data",):
            options = (*args.options, f"mesh.{axis}={count}")
            config = config_of(Task(OURS[0], size, rows * count, length, args.vocab_size, args.dtype, 0, options))
            compiled = lower_step(
                config, make_mesh(MeshSizes()._replace(**{axis: count}), jax.devices()[:count])
            ).compile()
            flops = compiled.cost_analysis()["flops"]
            alone = alone or flops
            sent = collectives(compiled.as_text())
            shown = ", ".join(f"{kind} {found.bytes_sent / 1e6:,.0f} MB" for kind, found in sent.items())
            print(f"  {f'{axis} {count}':>24}{flops / 1e9:16,.1f}{flops / alone:9.3f}   {shown}", flush=True)


def ahead_of_time(args: argparse.Namespace) -> None:
    """Compile the steps of this package for the devices of a topology, and print their memory on each device."""
    from gpt2_flax.plan.ahead_of_time import compile_step
    from gpt2_flax.plan.topology import devices_for

    devices = devices_for(args.topology)
    print(f"compiled for {args.topology}, {args.dtype}, vocabulary {args.vocab_size:,}")
    print(f"  {'':8}{'':24}{'rows':>12}{'GiB a device':>14}{'':>16}{'compiled in':>13}")
    for size in args.sizes:
        for rows, length in args.shapes:
            for variant in (variant for variant in args.variants if variant in OURS):
                task = Task(variant, size, rows, length, args.vocab_size, args.dtype, 0, tuple(args.options))
                found = compile_step(config_of(task), devices, optimize=True)
                fits = "fits" if found.fits else "does not fit"
                print(
                    f"  {size:8}{variant:24}{f'{rows} x {length}':>12}{found.total / 2**30:14.1f}{fits:>16}"
                    f"{found.seconds:12.0f}s",
                )
                for name, choice in found.choices.items():
                    print(f"    {name} {choice}", flush=True)


def shape(text: str) -> tuple[int, int]:
    rows, length = text.split("x")
    return int(rows), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", default=["base"], choices=SIZES, help="sizes of the model (default: base)"
    )
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(4, 128), (1, 1024)], help="ROWSxLENGTH")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="(default: all)")
    parser.add_argument("--vocab-size", type=int, default=21128, help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on CPUs, else bfloat16")
    parser.add_argument("--steps", type=int, default=10, help="measured steps in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--scaling", action="store_true", help="compile for 1 to 8 simulated devices instead")
    parser.add_argument("--topology", help="compile for v5e:2x4, h200:1, ... instead, as gpt2-flax plan does")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="config keys of this package")
    args = parser.parse_args()
    if args.task:
        values = json.loads(args.task)
        print(json.dumps(measure(Task(*values))))
        return
    if args.scaling:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    args.dtype = args.dtype or ("float32" if on_cpu() and not args.topology else "bfloat16")
    if args.topology:
        ahead_of_time(args)
        return
    if args.scaling:
        scaling(args)
        return
    for size in args.sizes:
        for length in dict.fromkeys(length for _, length in args.shapes):
            same = [shape for shape in args.shapes if shape[1] == length]
            for shapes in [same] if args.dtype == "bfloat16" else [[shape] for shape in same]:
                compare(args, size, shapes)


def on_cpu() -> bool:
    """Return whether JAX uses the CPU; ask another process, so that this process holds no GPU memory."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "cpu"


if __name__ == "__main__":
    main()
