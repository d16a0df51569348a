"""Models out of this project and into it: export, import."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from gpt2_flax.cli.app import Model, Overwrite, Step, app, utf8

CardText = partial(typer.Option, callback=utf8)


@app.command()
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="Folder to make, for transformers.")],
    step: Step = None,
    format: Annotated[
        Literal["safetensors", "bin"], typer.Option(help="bin writes pytorch_model.bin beside model.safetensors.")
    ] = "safetensors",
    name: Annotated[str | None, CardText(help="Title of the model card; the folder's name when left out.")] = None,
    language: Annotated[str | None, CardText(help="Language code for the model card, such as zh.")] = None,
    license: Annotated[str | None, CardText(help="License for the model card, such as apache-2.0.")] = None,
    prompt: Annotated[str | None, CardText(help="Example prompt for the model card.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model as a transformers folder, and check that it computes the same there."""
    from gpt2_flax.checkpoint.source import load_source
    from gpt2_flax.export.publish import publish
    from gpt2_flax.export.transformers_folder import MARKER
    from gpt2_flax.export.verify import NOT_VERIFIED
    from gpt2_flax.folders import check_output

    check_output(output, MARKER, overwrite)
    verification = publish(
        load_source(model, step),
        output,
        torch_bin=format == "bin",
        overwrite=overwrite,
        name=name or output.resolve().name,
        language=language,
        license=license,
        prompt=prompt,
    )
    print(f"{output}: {verification or NOT_VERIFIED}")


@app.command(name="import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A transformers folder that holds a GPT-2.")],
    output: Annotated[Path, typer.Argument(help="Folder to make, usable wherever a run is: init_from, generate, ...")],
    overwrite: Overwrite = False,
) -> None:
    """Take in a GPT-2 from transformers, to train it on or to use it."""
    from gpt2_flax.checkpoint.source import load_source, save_as_run

    source = load_source(folder)
    save_as_run(source, output, overwrite)
    print(f"{output}: {len(source.weights)} parameter arrays of {folder}")
