"""Measure generation of GPT-2 against `transformers` in PyTorch, on the same machine in one run.

Each variant runs in its own process, in turn, round after round, so that a slow phase of the machine affects all. All
variants do the same: read prompts of equal length and add tokens with a cache of keys and values, in float32, without
an early end. Weights are random. Greedy texts of such a model soon repeat themselves, like texts of small trained
models, and gpt2_flax profits from it (inference/prompt_lookup.py). Sampled texts never repeat anything, so it cannot
profit. The speed for other texts is between these two.

    gpt2_flax      this project
    torch          `generate` of transformers
    torch_lookup   the same with prompt_lookup_num_tokens=7, for one row

    tokens/s   new tokens of all rows divided by the time of a call, prompts included (slowest to fastest call)
    ms/step    the time of a call divided by the new tokens of a row
    start      the first call, compilation included: a process needs it once for texts of such sizes

    python scripts/benchmark_generate.py                       # CPU: 124M, batches of 1 and 16, 32 + 128 tokens
    python scripts/benchmark_generate.py --variants gpt2_flax --batches 1 4 --new 64
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

SIZES = {  # layers, width, heads
    "tiny": (2, 64, 2),
    "base": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
}
VARIANTS = ("gpt2_flax", "torch", "torch_lookup")
MODES = ("greedy", "sampled")


class Task(NamedTuple):
    """The measurement of one process."""

    variant: str
    mode: str
    size: str
    rows: int
    prompt: int
    new: int
    vocab_size: int
    calls: int


def measure(task: Task) -> dict[str, float | list[float]]:
    """Return the seconds of the first call, and of the calls after the warm-up."""
    call = (ours if task.variant == "gpt2_flax" else theirs)(task)
    start, *times = [_seconds(call) for _ in range(task.calls + 2)]
    return {"start": start, "seconds": times[1:]}


def _seconds(call: Callable[[], int]) -> float:
    begin = time.perf_counter()
    n_new = call()
    seconds = time.perf_counter() - begin
    if n_new < 1:
        raise SystemExit("no tokens")
    return seconds


def ours(task: Task) -> Callable[[], int]:
    from gpt2_flax.cpu import tune_cpu

    tune_cpu()
    import jax
    import numpy as np
    from flax import nnx

    from gpt2_flax.config.model import ModelConfig
    from gpt2_flax.inference.decode import generate
    from gpt2_flax.inference.sampling import Sampling
    from gpt2_flax.model.decoding import decoder_of
    from gpt2_flax.model.gpt2 import GPT2

    n_layer, n_embd, n_head = SIZES[task.size]
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "n_positions": 1024}
    config = ModelConfig(vocab_size=task.vocab_size, **sizes, dtype="float32")
    decoder = decoder_of(jax.jit(lambda: GPT2(config, rngs=nnx.Rngs(0)))())
    prompts = np.random.default_rng(0).integers(task.vocab_size, size=(task.rows, task.prompt)).tolist()
    never = -1  # the id that ends a text: none

    def call() -> int:
        rows = generate(decoder, prompts, never, task.new, Sampling(temperature=float(task.mode == "sampled")))
        assert all(len(row) == task.new for row in rows)
        return len(rows)

    return call


def theirs(task: Task) -> Callable[[], int]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, n_embd, n_head = SIZES[task.size]
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "n_positions": 1024}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=task.vocab_size, **sizes, bos_token_id=1, eos_token_id=None)).eval()
    ids_BT = torch.randint(task.vocab_size, (task.rows, task.prompt))
    options = {"max_new_tokens": task.new, "pad_token_id": 0, "eos_token_id": None}
    options |= {"do_sample": task.mode == "sampled", "top_k": 0 if task.mode == "sampled" else None}
    if task.variant == "torch_lookup":
        options["prompt_lookup_num_tokens"] = 7

    def call() -> int:
        with torch.inference_mode():
            found_BS = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
        assert found_BS.shape == (task.rows, task.prompt + task.new)
        return task.rows

    return call


def run_in_new_process(task: Task) -> dict | None:
    """Measure in a new process; return None if it fails."""
    done = subprocess.run([sys.executable, __file__, "--task", json.dumps(task)], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        print(f"  {task.variant} with {task.rows} rows failed: {last[0][:160]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, rows: int, mode: str) -> None:
    """Print the variants' speeds for one batch size."""
    variants = [variant for variant in args.variants if rows == 1 or variant != "torch_lookup"]
    found: dict[str, list[dict]] = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant, results in found.items():
            task = Task(variant, mode, args.size, rows, args.prompt, args.new, args.vocab_size, args.calls)
            if (result := run_in_new_process(task)) is not None:
                results.append(result)
    print(f"\n{args.size}, batch {rows}, prompts of {args.prompt}, {args.new} new tokens, {mode}, float32")
    print(f"  {'':14}{'tokens/s':>10}{'':20}{'ms/step':>10}{'start':>9}{'gpt2_flax':>11}")
    seconds = {
        variant: [time for result in results for time in result["seconds"]]
        for variant, results in found.items()
        if results
    }
    speeds = {variant: rows * args.new / statistics.median(times) for variant, times in seconds.items()}
    for variant, times in seconds.items():
        spread = f"({rows * args.new / max(times):,.0f} to {rows * args.new / min(times):,.0f})"
        step = 1000 * statistics.median(times) / args.new
        start = statistics.median(result["start"] for result in found[variant])
        ratio = f"{speeds['gpt2_flax'] / speeds[variant]:.2f}x" if "gpt2_flax" in speeds else ""
        print(f"  {variant:14}{speeds[variant]:10,.1f} {spread:19}{step:10.1f}{start:7.1f} s{ratio:>11}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=SIZES, help="size of the model (default: base)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="batch sizes (default: 1 16)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in a prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=128, help="new tokens in a row (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=21128, help="(default: %(default)s)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="(default: all)")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="(default: all)")
    parser.add_argument("--calls", type=int, default=3, help="measured calls in each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(Task(*json.loads(args.task)))))
        return
    for rows in args.batches:
        for mode in args.modes:
            compare(args, rows, mode)


if __name__ == "__main__":
    main()
