"""Commands about training: doctor, train, plan, configs, init, checkpoints, report, keys, evaluate."""

from collections.abc import Mapping
from functools import partial
from json import dumps as to_json
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from gpt2_flax.cli.app import (
    Average,
    Best,
    Json,
    Model,
    PathArgument,
    PathOption,
    Revision,
    Step,
    TextArgument,
    TextOption,
    app,
    config_or_override,
    corpus_source,
    positive,
    utf8,
)
from gpt2_flax.cli.text import Between, Encoding, Format, OnBad, TextField
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.input_files import MOST_POSITIONS, MOST_ROWS, MOST_STEPS, MOST_TOKENS

ConfigFile = Annotated[
    Path | None,
    Argument(parser=config_or_override, help="A name that `gpt2-flax configs` lists, or a TOML or JSON file."),
]
Overrides = Annotated[
    list[str] | None,
    Argument(metavar="[SECTION.KEY=VALUE]...", callback=utf8, help="Values that override the config file."),
]


@app.command()
def doctor(
    seconds: Annotated[
        float, Option(min=10, max=86400, help="Seconds for the examination; the most important checks come first.")
    ] = 280,
    json: Json = False,
) -> None:
    """Examine this machine: versions, devices, speed, attention kernels, training. Attach the output to bug reports.

    Each fault is a line WRONG with advice; the exit code is 69 then. Several GPUs of this machine are tested together;
    other machines are not tested.
    """
    from gpt2_flax.doctor.examination import count_of, examine

    found = examine(seconds, (lambda line: None) if json else partial(print, flush=True))
    if json:
        print(to_json(found, ensure_ascii=False, indent=1))
    if wrong := found["wrong"]:
        what = f"{count_of(wrong)} wrong with this machine or what is installed"
        fix = 'see the list "wrong" in the JSON' if json else "see the lines that begin with WRONG"
        raise UserError(ExitCode.UNAVAILABLE, what, "gpt2-flax doctor", fix)


@app.command(epilog="The keys: gpt2-flax keys")
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    allow_change: Annotated[list[str] | None, Option(help="Key that may change in a resumed run; repeatable.")] = None,
    profile: Annotated[
        int, Option(min=0, max=MOST_STEPS, metavar="STEPS", help="Steps to trace for TensorBoard or XProf.")
    ] = 0,
    max_hours: Annotated[
        float | None,
        Option(max=MOST_ROWS, callback=positive, metavar="H", help="Save and stop within this many hours."),
    ] = None,
    quiet: Annotated[bool, Option("--quiet", help="Print only warnings and errors.")] = False,
    coordinator: Annotated[
        str | None, Option(help="Several hosts: HOST:PORT of process 0. PORT + 1 must be free and reachable too.")
    ] = None,
    num_processes: Annotated[int | None, Option(min=1, max=MOST_ROWS, help="Several hosts: process count.")] = None,
    process_id: Annotated[int | None, Option(min=0, max=MOST_ROWS, help="Several hosts: process number.")] = None,
) -> None:
    """Train a model, or resume a run that stopped.

    Without a CONFIG, give output, data.dataset and training.total_steps; all other keys have defaults.

    A config may have several stages, tables [[stages]]. Each stage starts from the weights of the stage before it:
    cluecorpussmall is an example. SECTION.KEY=VALUE applies to all stages, stages.2.SECTION.KEY=VALUE to the second.

    Under SLURM, Open MPI, Kubernetes (scripts/kubernetes_jobset.yaml), torchrun and on TPU pods several hosts find each
    other; elsewhere give --coordinator, --num-processes and --process-id. If one process ends, all end, with exit code
    75 if a restart helps.

    The first lines describe the run, and the last lines what came of it. At a terminal, a status below the lines shows
    the step, the loss and its course, speed, remaining time and memory.

    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 to any process stops the run after the current step, saves, and exits
    with 75; the same command resumes. A second signal ends the process at once. --max-hours stops in the same way. It
    leaves enough time for the save, by the durations of steps, evaluations and saves so far.
    """
    config, overrides = _config_and_overrides(config, overrides, "train")
    from gpt2_flax.api.run import train as run

    run(
        config,
        overrides,
        allow_change=allow_change or (),
        profile=profile,
        max_hours=max_hours,
        quiet=quiet,
        coordinator=coordinator,
        num_processes=num_processes,
        process_id=process_id,
    )


@app.command(epilog="The keys: gpt2-flax keys")
def plan(
    config: ConfigFile = None,
    overrides: Overrides = None,
    topology: Annotated[str | None, TextOption(help="Devices: v5e:2x4, v6e:16x16, h200:8, h200:32x8, ...")] = None,
    stage: Annotated[int | None, Option(min=1, max=MOST_ROWS, help="Stage of the config. Default: all.")] = None,
    mfu: Annotated[float, Option(min=0.01, max=1.0, help="Expected share of the devices' peak FLOPs.")] = 0.4,
    optimize: Annotated[bool, Option("--optimize", help="Compile with all optimizations: slow, more exact.")] = False,
    budget: Annotated[
        str | None, TextOption(help="Propose a config for a time on the devices, 24h, 90m or 7d, or for FLOPs, 1e21.")
    ] = None,
    dataset: Annotated[Path | None, PathOption(help="With --budget: the dataset to train on.")] = None,
    corpus_tokens: Annotated[
        str | None, TextOption(help="With --budget: tokens of the corpus, such as 14e9. Default: without limit.")
    ] = None,
    vocab_size: Annotated[
        int | None, Option(min=1, max=MOST_TOKENS, help="With --budget: tokens of the vocabulary. Default: 50257.")
    ] = None,
    seq_length: Annotated[
        int | None, Option(min=1, max=MOST_POSITIONS, help="With --budget: tokens in a row. Default: 1024.")
    ] = None,
    json: Json = False,
) -> None:
    """Estimate a run before it starts: parameters, tokens, FLOPs, memory, days. Or propose a run for a --budget.

    --topology compiles the real training step for TPUs or GPUs that this machine need not have. It shows the memory
    that the compiler reports, or the smallest change that makes the run fit.

    --budget prints a config: the model, batch and steps with the lowest predicted loss, and the reasons as comments. A
    budget of time counts --mfu of the peak of --topology, or of this machine's devices.
    """
    of_corpus = {"--corpus-tokens": corpus_tokens, "--vocab-size": vocab_size}
    if budget is not None:
        _refuse("does not go with --budget", {"CONFIG": config, "--stage": stage, "--optimize": optimize or None})
        _refuse("does not go with --budget, which prints TOML", {"--json": json or None})
        if dataset is not None:
            _refuse("does not go with --dataset, which has its own", of_corpus)
        from gpt2_flax.plan.budget import Corpus, parse_tokens, read_corpus
        from gpt2_flax.plan.report import budget_lines

        tokens = None if corpus_tokens is None else parse_tokens(corpus_tokens)
        corpus = Corpus(tokens, vocab_size or 50257) if dataset is None else read_corpus(dataset)
        print(*budget_lines(budget, topology, mfu, corpus, seq_length or 1024), sep="\n")
        return
    _refuse("goes only with --budget", {"--dataset": dataset, **of_corpus, "--seq-length": seq_length})
    config, overrides = _config_and_overrides(config, overrides, "plan")
    from gpt2_flax.config.file import load_config, load_stages

    stages = load_stages(config, overrides) if stage is None else [load_config(config, overrides, stage)]
    from gpt2_flax.plan.report import plan_lines
    from gpt2_flax.plan.topology import devices_for
    from gpt2_flax.plan.values import plan_values

    devices = devices_for(topology)
    if json:
        print(to_json([plan_values(planned, devices, mfu, topology, optimize) for planned in stages], indent=1))
        return
    for number, planned in enumerate(stages, 1):
        if len(stages) > 1:
            print(f"{'' if number == 1 else chr(10)}stage {number} of {len(stages)}: {planned.output}")
        for line in plan_lines(planned, devices, mfu, topology, optimize):
            print(line, flush=True)


def _config_and_overrides(
    first: Path | str | None, more: list[str] | None, command: str
) -> tuple[Path | None, list[str]]:
    """Return the config and the overrides of a command; raise `UserError` (USAGE) if there are none."""
    if first is None:
        fix = "give a config, such as one that `gpt2-flax configs` lists" + ", or --budget" * (command == "plan")
        raise UserError(ExitCode.USAGE, f"nothing to {command}", f"gpt2-flax {command}", fix)
    return (first, more or []) if isinstance(first, Path) else (None, [first, *(more or [])])


def _refuse(why: str, options: Mapping[str, object]) -> None:
    """Raise `UserError` (USAGE) that names the first of the options with a value; None is none."""
    for name in (name for name, value in options.items() if value is not None):
        raise UserError(ExitCode.USAGE, f"{name} {why}", "gpt2-flax plan", "leave it out")


@app.command()
def configs() -> None:
    """List the configs of this package with what they need. Their names go wherever a config file goes."""
    from gpt2_flax.config.named import named_configs

    for name, path in named_configs().items():
        with open(path, encoding="utf-8") as file:
            print(f"{name:<24} {file.readline().removeprefix('# ').rstrip()}")


@app.command()
def init(
    name: Annotated[str, TextArgument(metavar="NAME", help="A name listed by `gpt2-flax configs`.")],
) -> None:
    """Print a config of this package, to change it: gpt2-flax init base > mine.toml."""
    from gpt2_flax.config.named import config_text

    print(config_text(name), end="")


@app.command()
def checkpoints(
    run: Annotated[Path, PathArgument(help="A run folder.")],
    verify: Annotated[bool, Option("--verify", help="Compare the checksums of all arrays; 74 if one differs.")] = False,
    json: Json = False,
) -> None:
    """List the checkpoints of a run: step, date, losses, size, state.

    This command changes nothing. All other commands skip a damaged checkpoint; `train` moves it to RUN/damaged.
    """
    import time

    from gpt2_flax.checkpoint.listing import list_checkpoints
    from gpt2_flax.checkpoint.run_folder import RunFolder
    from gpt2_flax.progress import si

    found = list_checkpoints(RunFolder(run), verify)
    if json:
        print(to_json([one._asdict() for one in found], indent=1))
    else:
        print(f"{'step':>9}  {'saved':<19}  {'loss':>8}  {'validation':>10}  {'size':>8}  state")
        for one in found:
            saved = "-" if one.time is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.time))
            losses = ["-" if loss is None else f"{loss:.4f}" for loss in (one.train_loss, one.validation_loss)]
            state = one.state if one.damage is None else f"{one.state}: {one.damage}"
            print(f"{one.step:>9}  {saved:<19}  {losses[0]:>8}  {losses[1]:>10}  {si(one.bytes, 'B'):>8}  {state}")
    if damaged := ", ".join(str(one.step) for one in found if one.state == "damaged"):
        fix = "train passes them over; export or evaluate another step"
        raise UserError(ExitCode.IO, f"damaged checkpoints: {damaged}", run, fix)


@app.command()
def report(
    runs: Annotated[list[Path], PathArgument(metavar="RUN...", help="Run folders.")],
    output: Annotated[Path | None, PathOption(metavar="FILE", help="HTML file to write. Default: report.html.")] = None,
    csv: Annotated[Path | None, PathOption("--csv", metavar="FILE", help="Also write all curves as CSV.")] = None,
    png: Annotated[Path | None, PathOption("--png", metavar="FILE", help="Also draw the loss as PNG.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace files that are no reports.")] = False,
) -> None:
    """Write a page about one or several runs: curves, samples, config, data, checkpoints.

    The page is one file and needs no network. A run may still be in progress. `train` writes the same page to
    RUN/report.html when a run ends.
    """
    from gpt2_flax.report.page import report as write_report

    for path in write_report(runs, output or Path("report.html"), csv, png, overwrite):
        print(path)


@app.command()
def keys() -> None:
    """List every key of a training config with its default."""
    from pydantic_core import PydanticUndefined

    from gpt2_flax.config.parse import config_keys

    for key, field in config_keys().items():
        default = "required" if field.default is PydanticUndefined else field.default
        print(f"{key:<34} {'' if default is None else default!s:<10} {field.description}")


@app.command()
def evaluate(
    model: Model,
    data: Annotated[
        str | None, Option(parser=corpus_source, help="A dataset or a corpus. Default: the datasets of the run.")
    ] = None,
    seq_length: Annotated[
        int | None, Option(min=1, max=MOST_POSITIONS, help="Tokens in a row. Default: as in the run, else n_positions.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, max=MOST_ROWS, help="Rows in a batch.")] = 16,
    batches: Annotated[int, Option(min=0, max=MOST_STEPS, help="Number of batches; 0: all.")] = 0,
    split: Annotated[
        Literal["train", "validation"] | None, Option(help="Split of a dataset. Default: validation.")
    ] = None,
    per_document: Annotated[
        Path | None, PathOption(metavar="FILE.jsonl", help="New file with a JSON line for each document.")
    ] = None,
    format: Format = "auto",
    separator: Between = "line",
    field: TextField = "text",
    encoding: Encoding = "auto",
    on_error: OnBad = "stop",
    step: Step = None,
    best: Best = False,
    average: Average = 1,
    revision: Revision = None,
    json: Json = False,
) -> None:
    """Print loss, perplexity, bits per character and accuracy on held-out text.

    Lines of --per-document have data, index (from 0), tokens, characters, loss, perplexity and bits_per_character. For
    a dataset, characters and bits_per_character are null, because it stores only the total number of characters.
    """
    from gpt2_flax.api.load import load

    result = load(model, step=step, best=best, average=average, revision=revision).evaluate(
        data,
        seq_length=seq_length,
        batch_size=batch_size,
        batches=batches,
        split=split,
        per_document=per_document,
        format=format,
        separator=separator,
        field=field,
        encoding=encoding,
        on_error=on_error,
    )
    print(to_json(result.figures(), indent=1) if json else f"{result}  tokens {result.tokens:,}")
