"""The program's frame, and what all commands share."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import gpt2_flax
from gpt2_flax.folders import is_address, is_utf8, local_path

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
    if not is_utf8("".join(value or "")):
        raise typer.BadParameter("it is not UTF-8")
    return value


def positive(value: float | None) -> float | None:
    """Refuses what is not above 0, and what is no number."""
    if value is not None and not value > 0:
        raise typer.BadParameter("it must be above 0")
    return value


def _local_path(given: str) -> str:
    try:
        return local_path(given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _path(given: str) -> Path:
    return Path(_local_path(given))


def path_or_address(given: str) -> str:
    """Takes what `fsspec` may reach as it is; a path is expanded as all others are."""
    return given if is_address(given) else _local_path(given)


def corpus_source(given: str) -> str:
    """Takes files of any name, as they are only read; otherwise as `path_or_address`."""
    return path_or_address(given) if is_utf8(given) else given


def existing_model(path: Path) -> Path:
    """Refuses a path without a model before a command imports, computes or writes anything."""
    from gpt2_flax.checkpoint.run_folder import check_model

    return check_model(path)


PathArgument = partial(typer.Argument, parser=_path)
PathOption = partial(typer.Option, parser=_path)
ModelArgument = partial(PathArgument, callback=existing_model)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that an earlier call made.")]
Model = Annotated[Path, ModelArgument(help="A run folder, RUN/checkpoints/STEP, or a transformers folder.")]
Step = Annotated[int | None, typer.Option(help="Which checkpoint of a run; the newest when left out.")]
Bos = Annotated[
    str | None, typer.Option(callback=utf8, help="Token that begins a document, if the tokenizer's files do not say.")
]
Eos = Annotated[
    str | None, typer.Option(callback=utf8, help="Token that ends a document, if the tokenizer's files do not say.")
]
