"""The typer application, and the options and checks that commands share."""

import functools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from typer import Argument, Option

import gpt2_flax
from gpt2_flax import folders
from gpt2_flax.folders import HubModel, is_utf8, local_path, model_place
from gpt2_flax.input_files import MOST_STEPS

app = typer.Typer(
    name="gpt2-flax",
    help="Pre-train GPT-2 on your own text and export it for transformers.\n\n"
    "The steps from text to model: tokenizer, prepare, train, evaluate, generate, export.",
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

T = TypeVar("T")

DEBUG = "GPT2_FLAX_DEBUG"  # in the environment: show tracebacks


def _version(asked: bool) -> None:
    if asked:
        print(f"gpt2_flax {gpt2_flax.__version__}")
        raise typer.Exit


@app.callback()
def everywhere(
    context: typer.Context,
    version: Annotated[bool, Option("--version", is_eager=True, callback=_version, help="Print the version.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if debug:
        os.environ[DEBUG] = "1"
    if context.invoked_subcommand is None:
        print(context.get_help())


def utf8(value: str | list[str] | None) -> str | list[str] | None:
    """Reject text from a terminal with another encoding, which Python passes on as lone surrogates."""
    if not is_utf8("".join(value or "")):
        raise typer.BadParameter("it is not UTF-8")
    return value


def positive(value: float | None) -> float | None:
    """Reject numbers that are not above 0, and NaN."""
    if value is not None and not value > 0:
        raise typer.BadParameter("it must be above 0")
    return value


def _parser(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return `parse` with the sentence of its ValueError, which typer would drop."""

    @functools.wraps(parse)
    def parsed(given: str) -> T:
        try:
            return parse(given)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return parsed


@_parser
def _path(given: str) -> Path:
    return Path(local_path(given))


def config_or_override(given: str) -> Path | str:
    """Return a path; or `section.key=value` as it is, because a config may be left out. A file of that name wins."""
    from gpt2_flax.config.file import is_override

    return given if is_override(given) and is_utf8(given) and not os.path.lexists(given) else _path(given)


path_or_address, corpus_source = _parser(folders.path_or_address), _parser(folders.corpus_source)


def existing_model(place: "Place") -> "Place":
    """Reject a path without a model before a command imports, computes or writes anything."""
    from gpt2_flax.checkpoint.run_folder import check_model

    return check_model(place)


if TYPE_CHECKING:
    Place = Path | HubModel
else:
    Place = Path  # typer does not take a union; the parser decides

TextArgument = partial(Argument, callback=utf8)
TextOption = partial(Option, callback=utf8)
PathArgument = partial(Argument, parser=_path)
PathOption = partial(Option, parser=_path)
ModelArgument = partial(Argument, parser=_parser(model_place), callback=existing_model)
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an output folder from an earlier call.")]
Model = Annotated[
    Place,
    ModelArgument(help="A run folder, RUN/checkpoints/STEP, a transformers folder, or OWNER/NAME on the hub."),
]
Revision = Annotated[
    str | None, TextOption(help="Branch, tag or commit of a model on the Hugging Face hub. Default: main.")
]
Step = Annotated[int | None, Option(min=0, max=MOST_STEPS, help="The checkpoint of a run to use. Default: the newest.")]
Json = Annotated[bool, Option("--json", help="Print JSON instead of text.")]
Best = Annotated[bool, Option("--best", help="Use the checkpoint of a run with the lowest validation loss.")]
Average = Annotated[
    int,
    Option(min=1, max=MOST_STEPS, help="Average the weights of this many checkpoints of a run, up to the one to use."),
]
Bos = Annotated[str | None, TextOption(help="Token that begins a document. Default: by the tokenizer's files.")]
Eos = Annotated[str | None, TextOption(help="Token that ends a document. Default: by the tokenizer's files.")]
