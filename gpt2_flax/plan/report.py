"""The reports of `gpt2-flax plan`: what a run takes, before it costs anything, and what to train within a budget."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tomli_w

from gpt2_flax.config.schema import Config, OptimizerConfig, ResolvedConfig
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError, printable
from gpt2_flax.model.flops import flops_per_token
from gpt2_flax.parallel.devices import Device, memory_bytes, peak_flops
from gpt2_flax.parallel.mesh import MeshSizes
from gpt2_flax.plan.ahead_of_time import Compiled, compile_step, memory_fraction, smallest_change
from gpt2_flax.plan.budget import (
    DROPOUT_EPOCHS,
    LEAST_WORTH,
    REPEATED_TOKENS,
    SHAPES,
    Choice,
    Corpus,
    best_batch,
    choices,
    parse_budget,
    run_values,
)
from gpt2_flax.plan.estimate import (
    Figures,
    as_many_as_configured,
    checkpoint_bytes,
    figures,
    memory,
    mesh_sizes,
    read_datasets,
)
from gpt2_flax.plan.topology import devices_for, kind_and_count
from gpt2_flax.progress import duration, si, status

_COLUMN = 24
_NEIGHBOURS = 3  # of the recommended model in the table, on each side


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
        devices, whose = as_many_as_configured(config, devices)
        yield _line("devices", f"{_kind(devices)}, {whose}; for others: --topology")
        yield from _estimate_lines(config, devices)
    else:
        yield _line("devices", f"{topology}, {_kind(devices)}")
        yield from _compiled_lines(config, devices, optimize)
    yield from _duration_lines(config, counts, devices, mfu)


def budget_lines(budget: str, topology: str | None, mfu: float, corpus: Corpus, seq_length: int) -> Iterator[str]:
    """Yield the lines of a TOML file that trains the best model for a budget; the report is its comments.

    Args:
        budget: text for `parse_budget`.
        topology: name of the devices; None means the devices of this machine if the budget is a time, else none.
        mfu: share of the devices' peak FLOP/s that training is assumed to reach.
        corpus: tokens and vocabulary.
        seq_length: tokens in a row.

    Raises:
        UserError: USAGE if the peak of the devices is not known, or like `parse_budget`, `choices` and `run_values`.
    """
    amount, is_time = parse_budget(budget)
    hardware = _hardware(topology) if is_time or topology is not None else None
    flops = amount * hardware.peak * mfu if hardware and is_time else amount
    found = choices(flops, corpus, seq_length)
    chosen = min(found, key=lambda choice: choice.loss)
    values = run_values(chosen, hardware.n_devices if hardware else 1)
    lines = [
        _line("budget", f"{budget}: " * is_time + _flop(flops) + (f" on {hardware.name}" if hardware else "")),
        *_corpus_lines(corpus),
    ]
    if hardware:
        lines.append(_line("MFU", f"{mfu:.0%} of {_flop(hardware.peak)}/s, assumed: see --mfu"))
    lines += ["", *_table_lines(found, chosen, hardware and hardware.peak * mfu), ""]
    lines += _reason_lines(chosen, values, flops, corpus)
    yield from (f"# {line}".rstrip() for line in lines)
    if corpus.folder is not None:
        values["data"] = {"dataset": corpus.folder, **values["data"]}
    yield ""
    yield from tomli_w.dumps(values).splitlines()


class _Hardware(NamedTuple):
    name: str
    n_devices: int
    peak: float
    """FLOP/s of all devices together."""


def _hardware(topology: str | None) -> _Hardware:
    if topology is None:
        devices = devices_for(None)
        kind, count = devices[0].device_kind, len(devices)
    else:
        kind, count = kind_and_count(topology)
    peak = peak_flops(kind, "bfloat16")
    if peak is None:
        fix = "name devices with --topology, such as h100:8, or give floating point operations, such as 1e21"
        raise UserError(ExitCode.USAGE, f"the peak FLOP/s of {kind} are not known", "--budget", fix)
    return _Hardware(f"{count} x {kind}", count, count * peak)


def _corpus_lines(corpus: Corpus) -> Iterator[str]:
    tokens = "without limit; set one with --dataset or --corpus-tokens"
    if corpus.tokens is not None:
        tokens = f"{corpus.tokens:,.0f} tokens" + ("" if corpus.folder is None else f" in {printable(corpus.folder)}")
    yield _line("corpus", tokens)
    whose = "see --vocab-size" if corpus.folder is None else "as the dataset has"
    yield _line("vocabulary", f"{corpus.vocab_size:,} tokens, {whose}")


def _table_lines(found: Sequence[Choice], chosen: Choice, speed: float | None) -> Iterator[str]:
    """Yield a table of the chosen model and its neighbours; `speed` is in FLOP/s."""
    columns = ("n_layer", "n_head", "n_embd", "parameters", "tokens", "epochs", "loss", "time" if speed else "FLOPs")
    yield _row(*columns)
    index = found.index(chosen)
    for choice in found[max(0, index - _NEIGHBOURS) : index + _NEIGHBOURS + 1]:
        flops = choice.tokens * choice.flops_per_token
        epochs = "-" if choice.epochs is None else f"{choice.epochs:,.2f}"
        cells = (si(choice.model.parameters), si(choice.tokens), epochs, f"{choice.loss - chosen.loss:+.3f}")
        *sizes, name = choice.shape
        row = _row(*map(str, sizes), *cells, duration(flops / speed) if speed else f"{flops:.3g}")
        yield "  ".join(filter(None, (row, name, "<- recommended" if choice is chosen else "")))


def _row(*cells: str) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, (7, 8, 8, 12, 9, 9, 9, 10), strict=True))


def _reason_lines(chosen: Choice, values: Mapping[str, Any], flops: float, corpus: Corpus) -> Iterator[str]:
    rows, steps, length = values["data"]["global_batch_size"], values["training"]["total_steps"], chosen.seq_length
    yield _line("loss", "predicted, in nats a token above the lowest (arXiv:2203.15556, arXiv:2305.16264); fitted on")
    yield _line("", "English web text with GPT-2's tokenizer, so only the differences count")
    end = {SHAPES[0]: ", and the smallest that is tried", SHAPES[-1]: ", and the largest that is tried"}
    yield _line("model", f"the lowest predicted loss of all shapes{end.get(chosen.shape, '')}")
    used, ratio = chosen.tokens * chosen.flops_per_token / flops, chosen.tokens / chosen.model.parameters
    spent = f"{used:.0%}" if used >= 0.01 else "less than 1%"
    yield _line("tokens", f"{chosen.tokens:,.0f}, {ratio:.3g} for each parameter; {spent} of the budget at")
    yield _line("", f"{_flop(chosen.flops_per_token)} for a token, including attention and the head, and with growth")
    if used < 0.99:
        yield _line(
            "", f"of this corpus, more epochs or parameters would be worth less than {LEAST_WORTH:.0%} of new ones"
        )
    if chosen.epochs is not None:
        worth = f"after R repetitions a token is worth e^(-R/{REPEATED_TOKENS:.2f}) of a new one (arXiv:2305.16264)"
        yield _line("epochs", f"{chosen.epochs:,.2f}; {worth}")
    near = f"near 0.58 x tokens^0.571 = {best_batch(chosen.tokens):,.0f} (arXiv:2503.04715)"
    yield _line("batch", f"{rows:,} rows of {length:,}, {rows * length:,} tokens; {near}")
    yield _line("steps", f"{steps:,}, as many whole batches as the tokens fill")
    smaller = "{until:.0%} of the steps train {n_layer}".format(**values["growth"])
    saved = 1 - chosen.flops_per_token / flops_per_token(chosen.model, length)
    of_all = f"of {chosen.model.n_layer} layers, {saved:.0%} fewer FLOP"
    yield _line("growth", f"{smaller} {of_all}; the laws do not know it")
    rate = OptimizerConfig().learning_rate
    yield _line("learning rate", f"{rate}, the default of Muon; its updates have the same spectral norm at every width")
    why = f"text that is read fewer than {DROPOUT_EPOCHS} times is almost as good as new text"
    if chosen.dropout:
        why = f"text that is read {DROPOUT_EPOCHS} times or more is worth less than new text"
    yield _line("dropout", f"{chosen.dropout:g}; {why} (arXiv:2305.16264)")
    missing = "output=RUN" + " data.dataset=DATASET" * (corpus.folder is None)
    yield _line("next", f"gpt2-flax train FILE.toml {missing}; `plan` shows the memory")


def _kind(devices: Sequence[Device]) -> str:
    return f"{len(devices)} x {devices[0].device_kind}"


def _figure_lines(config: ResolvedConfig, counts: Figures, mixture: Mixture | None) -> Iterator[str]:
    embeddings, blocks = f"{counts.in_embeddings:,} in embeddings", f"{counts.in_blocks:,} in blocks"
    rows, length = config.data.global_batch_size, config.data.seq_length
    yield _line("parameters", f"{counts.parameters:,}: {embeddings}, {blocks}")
    yield _line("a token", f"{_flop(counts.flops_per_token)}, forward and backward")
    yield _line("a step", f"{counts.tokens_per_step:,} tokens: {rows:,} rows of {length:,}")
    if config.growth_steps:
        smaller = config.before_growth()
        flops, length = flops_per_token(smaller.model, smaller.data.seq_length), smaller.data.seq_length
        layers = f"{smaller.model.n_layer} layers and rows of {length:,}"
        yield _line("growth", f"{layers} in the first {config.growth_steps:,} steps, {_flop(flops)} a token")
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
    yield _line("a checkpoint", f"{si(size, 'B')}, {moments}; up to {kept} kept, {si(size * kept, 'B')}")


def _estimate_lines(config: ResolvedConfig, devices: Sequence[Device]) -> Iterator[str]:
    sizes, why = mesh_sizes(config, devices)
    bytes_of, available = memory(config, sizes), memory_bytes(devices[0])
    yield _mesh_line(sizes, why)
    yield _line("memory a device", f"about {si(bytes_of.total, 'B')}{_of(available)}")
    yield _line("  parameters", si(bytes_of.parameters, "B"))
    yield _line("  gradients", si(bytes_of.gradients, "B"))
    yield _line("  optimizer", si(bytes_of.optimizer, "B"))
    yield _line("  activations", f"{si(bytes_of.activations, 'B')}, with model.remat = {config.model.remat}")
    yield _line("  loss", f"{si(bytes_of.loss, 'B')}, the largest chunk of logits and its gradient")


def _compiled_lines(config: ResolvedConfig, devices: Sequence[Device], optimize: bool) -> Iterator[str]:
    with status("compiling"):
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
    change = smallest_change(config, devices, optimize, status)
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
    total, available = si(compiled.total, "B"), _of(compiled.available)
    items = f"{si(compiled.arguments, 'B')} state and batch, {si(compiled.temporaries, 'B')} temporaries"
    if compiled.collectives is None:
        yield _line("memory a device", f"{total} or more{available}, says the compiler: {items}")
        return
    yield _line("memory a device", f"{total}{available}: {items}")
    for kind, found in compiled.collectives.items():
        times = "once" if found.count == 1 else f"{found.count:,} times"
        yield _line("sent a step", f"{kind} {times}, {si(found.bytes_sent, 'B')} from a device")
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


def _line(name: str, value: str) -> str:
    return f"{name:<{_COLUMN}}{value}"


def _of(available: float | None) -> str:
    return f" of {si(available, 'B')}" if available else ""


def _flop(count: float) -> str:
    for limit, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P")):
        if count >= limit:
            return f"{count / limit:.3g}{prefix} FLOP"
    return si(count, "FLOP")
