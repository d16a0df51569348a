"""What makes models: doctor, plan, train, keys, evaluate."""

import math
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from gpt2_flax.cli.app import Best, Model, PathArgument, PathOption, Step, app, corpus_source, positive, utf8
from gpt2_flax.cli.text import Between, Encoding, Format, OnBad, TextField
from gpt2_flax.input_files import MOST_POSITIONS, MOST_ROWS, MOST_STEPS
from gpt2_flax.text.documents import CorpusOptions


@app.command()
def doctor(
    seconds: Annotated[
        float, typer.Option(min=10, max=86400, help="Time for everything; what matters most comes first.")
    ] = 280,
    json: Annotated[
        Path | None, PathOption("--json", metavar="FILE", help="Write all that is found to this new file.")
    ] = None,
) -> None:
    """Examine this machine: versions, devices, speed, attention kernels, training. Run it first; attach it to reports.

    Each thing that is wrong is a line WRONG with what to do, and the exit code is 69. Several GPUs of this machine are
    tested together; other machines are not.
    """
    from gpt2_flax.doctor.examination import examine

    examine(seconds, json, lambda line: print(line, flush=True))


@app.command(epilog="The keys: gpt2-flax keys")
def train(
    config: Annotated[Path, PathArgument(help="TOML file, such as configs/quickstart.toml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", callback=utf8, help="What shall differ from the file."),
    ] = None,
    allow_change: Annotated[
        list[str] | None, typer.Option(help="Key that may differ from the run so far, when resuming; repeatable.")
    ] = None,
    profile: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_STEPS, metavar="STEPS", help="Trace so many steps for TensorBoard's profiler or XProf."
        ),
    ] = 0,
    max_hours: Annotated[
        float | None,
        typer.Option(
            max=MOST_ROWS, callback=positive, metavar="H", help="Stop and save, with 75, before so many hours are over."
        ),
    ] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="Several hosts: HOST:PORT of process 0. PORT + 1 must be free and reachable too.")
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, max=MOST_ROWS, help="Several hosts: number of processes.")
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(min=0, max=MOST_ROWS, help="Several hosts: number of this process.")
    ] = None,
) -> None:
    """Train a model, or go on with a run where it stopped.

    A file may hold several stages, tables [[stages]], which are trained in turn, each from the weights of the one
    before: configs/cluecorpussmall.toml is an example. SECTION.KEY=VALUE holds for all, stages.2.SECTION.KEY=VALUE for
    the second.

    Under SLURM, Open MPI, Kubernetes (scripts/kubernetes_jobset.yaml), torchrun and on TPU pods several hosts find each
    other; elsewhere give the three options above. When one process ends all do, with 75 where starting again helps.
    Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2, sent to one process or to all, stops after the step under way and
    saves, with 75; the same command resumes from there. A second signal ends the process at once. --max-hours stops
    likewise, early enough for the save, by the time that steps, evaluations and saves have taken so far.
    """
    begun = time.monotonic()
    from gpt2_flax.config_file import load_stages
    from gpt2_flax.processes.place import find_place
    from gpt2_flax.processes.watchdog import announced

    place = find_place(coordinator, num_processes, process_id)
    with announced(place):  # importing JAX may fail on one host
        from gpt2_flax.cpu import tune_cpu

        tune_cpu()
        from gpt2_flax.processes.launch import start_processes
        from gpt2_flax.training.loop import train as run

    deadline = math.inf if max_hours is None else begun + 3600 * max_hours
    with start_processes(place) as watchdog:
        stages = load_stages(config, overrides or ())  # here: what is wrong with it in one process ends all
        run(*stages, allow_change=allow_change or (), profile_steps=profile, watchdog=watchdog, deadline=deadline)


@app.command(epilog="The keys: gpt2-flax keys")
def plan(
    config: Annotated[Path, PathArgument(help="TOML file, such as configs/quickstart.toml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", callback=utf8, help="What shall differ from the file."),
    ] = None,
    topology: Annotated[
        str | None, typer.Option(help="Compile for v5e:2x4, v6e:16x16, h200:8, h200:32x8, ...; none need be here.")
    ] = None,
    stage: Annotated[
        int | None, typer.Option(min=1, max=MOST_ROWS, help="Which stage of the config; all when left out.")
    ] = None,
    mfu: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the devices' peak that training is taken to reach.")
    ] = 0.4,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Compile with all optimizations: minutes, for a little less memory.")
    ] = False,
) -> None:
    """Show what a run will take, before it does: parameters, tokens, arithmetic, memory, days.

    With --topology the real training step is compiled for TPUs or GPUs that need not be here, and what the compiler
    says of its memory is shown, or the smallest change that makes it fit.
    """
    from gpt2_flax.config_file import load_config, load_stages

    stages = load_stages(config, overrides or ()) if stage is None else [load_config(config, overrides or (), stage)]
    from gpt2_flax.plan.report import plan_lines
    from gpt2_flax.plan.topology import devices_for

    devices = devices_for(topology)
    for number, planned in enumerate(stages, 1):
        if len(stages) > 1:
            print(f"{'' if number == 1 else chr(10)}stage {number} of {len(stages)}: {planned.output}")
        for line in plan_lines(planned, devices, mfu, topology, optimize):
            print(line, flush=True)


@app.command()
def checkpoints(
    run: Annotated[Path, PathArgument(help="A run folder.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every array and compare it with its checksum; 74 if one differs.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
) -> None:
    """List the checkpoints of a run: step, date, losses, size, state.

    Nothing is changed. A damaged checkpoint is passed over by all other commands; `train` moves it to RUN/damaged.
    """
    import json as json_format
    import time

    from gpt2_flax.checkpoint.listing import list_checkpoints
    from gpt2_flax.checkpoint.run_folder import RunFolder
    from gpt2_flax.errors import ExitCode, UserError
    from gpt2_flax.progress import si

    found = list_checkpoints(RunFolder(run), verify)
    if json:
        print(json_format.dumps([one._asdict() for one in found], indent=1))
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
def keys() -> None:
    """List every key of a training config with its default."""
    from pydantic_core import PydanticUndefined

    from gpt2_flax.config import config_keys

    for key, field in config_keys().items():
        default = "required" if field.default is PydanticUndefined else field.default
        print(f"{key:<34} {'' if default is None else default!s:<10} {field.description}")


@app.command()
def evaluate(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(parser=corpus_source, help="A dataset or a corpus; the datasets of the run when left out."),
    ] = None,
    seq_length: Annotated[
        int | None, typer.Option(min=1, max=MOST_POSITIONS, help="Tokens a row; the run's, else n_positions.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="Rows computed together.")] = 16,
    batches: Annotated[int, typer.Option(min=0, max=MOST_STEPS, help="Batches to read; 0 reads everything.")] = 0,
    split: Annotated[
        Literal["train", "validation"] | None, typer.Option(help="Of a dataset; validation when left out.")
    ] = None,
    per_document: Annotated[
        Path | None, PathOption(metavar="FILE.jsonl", help="Write a line of JSON for each document to this new file.")
    ] = None,
    format: Format = "auto",
    separator: Between = "line",
    field: TextField = "text",
    encoding: Encoding = "auto",
    on_error: OnBad = "stop",
    step: Step = None,
    best: Best = False,
) -> None:
    """Print loss, perplexity, bits per character and accuracy on text that was not trained on.

    Lines of --per-document have data, index (from 0), tokens, characters, loss, perplexity and bits_per_character.
    Characters are known of text; a dataset knows only those of all its documents, so there the two are null.
    """
    from gpt2_flax.checkpoint.source import load_source
    from gpt2_flax.inference.evaluate import evaluate_source

    options = CorpusOptions(format, separator, field, encoding, on_error)
    source = load_source(model, step, best=best)
    result = evaluate_source(source, data, seq_length, batch_size, batches, options, split, per_document)
    print(f"{result}  tokens {result.tokens:,}")
