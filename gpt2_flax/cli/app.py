"""The program's frame, and what all commands share."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import gpt2_flax

app = typer.Typer(
    name="gpt2-flax",
    help="Pre-train GPT-2 on your own text and hand it over in transformers format.\n\n"
    "The way from text to model: tokenizer, prepare, train, evaluate, generate, export.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEBUG = "GPT2_FLAX_DEBUG"  # in the environment: show tracebacks


def _version(asked: bool) -> None:
    if asked:
        print(f"gpt2_flax {gpt2_flax.__version__}")
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"


def utf8(value: str | list[str] | None) -> str | list[str] | None:
    """Refuses what a terminal of another encoding typed: Python hands it over as lone surrogates."""
    try:
        "".join(value or "").encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is not UTF-8") from None
    return value


def existing_model(path: Path) -> Path:
    """Refuses a path without a model before a command imports, computes or writes anything."""
    from gpt2_flax.checkpoint.run_folder import check_model

    return check_model(path)


ModelArgument = partial(typer.Argument, callback=existing_model)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that an earlier call made.")]
Model = Annotated[Path, ModelArgument(help="A run folder, RUN/checkpoints/STEP, or a transformers folder.")]
Step = Annotated[int | None, typer.Option(help="Which checkpoint of a run; the newest when left out.")]
