"""Models out of this project and into it: export, import, convert."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from gpt2_flax.cli.app import Best, Bos, Eos, Model, ModelArgument, Overwrite, PathArgument, PathOption, Step, app, utf8
from gpt2_flax.tokenizers.special_tokens import Ends

CardText = partial(typer.Option, callback=utf8)
CardArgument = partial(typer.Argument, callback=utf8)
ItsTokenizer = Annotated[
    Path | None, PathOption("--tokenizer", help="vocab.txt or a tokenizer folder, for a model that comes without.")
]
UerConfig = Annotated[
    Path | None, PathOption(help="The config.json a UER-py model was trained with: heads, which shapes do not tell.")
]


@app.command()
def export(
    model: Model,
    output: Annotated[Path, PathArgument(help="Folder to make, for transformers.")],
    step: Step = None,
    best: Best = False,
    format: Annotated[
        Literal["safetensors", "bin", "gguf"],
        typer.Option(help="bin and gguf write pytorch_model.bin or model.gguf beside model.safetensors."),
    ] = "safetensors",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the weights; they are rounded to it.")
    ] = "float32",
    max_shard_size: Annotated[str, CardText(help="Size above which model.safetensors is cut into shards.")] = "5GB",
    name: Annotated[str | None, CardText(help="Title of the model card; the folder's name when left out.")] = None,
    language: Annotated[str | None, CardText(help="Language code for the model card, such as zh.")] = None,
    license: Annotated[str | None, CardText(help="License for the model card, such as apache-2.0.")] = None,
    prompt: Annotated[
        str | None,
        CardText(
            help="Example prompt for the model card; the run's first, or words of a validation document, if not given."
        ),
    ] = None,
    dataset: Annotated[
        list[str] | None, CardText(help="Name of a dataset on the Hugging Face hub, for the model card; repeatable.")
    ] = None,
    hardware: Annotated[
        str | None, CardText(help="What it was trained on, for the model card; what the run says when left out.")
    ] = None,
    card_extra: Annotated[Path | None, PathOption(help="Markdown file whose text is added to the model card.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model as a transformers folder, and check that it computes the same there."""
    from gpt2_flax.checkpoint.source import load_source
    from gpt2_flax.export.publish import publish
    from gpt2_flax.export.transformers_folder import MARKER
    from gpt2_flax.export.verify import NOT_VERIFIED
    from gpt2_flax.export.weight_files import shard_size
    from gpt2_flax.folders import check_output

    shard_bytes = shard_size(max_shard_size)
    check_output(output, MARKER, overwrite)
    verification = publish(
        load_source(model, step, best=best),
        output,
        format=format,
        dtype=dtype,
        max_shard_size=shard_bytes,
        overwrite=overwrite,
        card_extra=card_extra,
        name=name or output.resolve().name,
        language=language,
        license=license,
        prompt=prompt,
        datasets=tuple(dataset or ()) or None,
        hardware=hardware,
    )
    print(f"{output}: {verification or NOT_VERIFIED}")


@app.command(name="import")
def import_(
    model: Annotated[
        Path,
        ModelArgument(help="A transformers folder that holds a GPT-2, a .bin of UER-py, or a ckpt.pt of nanoGPT."),
    ],
    output: Annotated[Path, PathArgument(help="Folder to make, usable wherever a run is: init_from, generate, ...")],
    tokenizer: ItsTokenizer = None,
    uer_config: UerConfig = None,
    bos: Bos = None,
    eos: Eos = None,
    overwrite: Overwrite = False,
) -> None:
    """Import a GPT-2 from transformers, UER-py, TencentPretrain or nanoGPT, to continue its training or to use it."""
    from gpt2_flax.checkpoint.source import IMPORTED, load_source, save_as_run
    from gpt2_flax.export.publish import compare_with_original
    from gpt2_flax.folders import check_output

    check_output(output, IMPORTED, overwrite)
    source = load_source(model, tokenizer=tokenizer, uer_config=uer_config, ends=Ends(bos, eos))
    compared = f", {found}" if (found := compare_with_original(model, source)) else ""
    save_as_run(source, output, overwrite)
    print(f"{output}: {len(source.weights)} parameter arrays of {model}{compared}")


@app.command()
def convert(
    model: Annotated[
        Path,
        ModelArgument(
            help="A .bin of UER-py, a ckpt.pt of nanoGPT, a transformers folder, a run, or RUN/checkpoints/STEP."
        ),
    ],
    output: Annotated[Path, PathArgument(help="Folder to make: for transformers, or with --format uer for UER-py.")],
    format: Annotated[
        Literal["safetensors", "bin", "gguf", "uer"],
        typer.Option(help="bin and gguf write a file more beside model.safetensors; uer: model.bin for UER-py."),
    ] = "safetensors",
    tokenizer: ItsTokenizer = None,
    uer_config: UerConfig = None,
    bos: Bos = None,
    eos: Eos = None,
    name: Annotated[str | None, CardText(help="Title of the model card; the folder's name when left out.")] = None,
    language: Annotated[str | None, CardText(help="Language code for the model card, such as zh.")] = None,
    license: Annotated[str | None, CardText(help="License for the model card, such as apache-2.0.")] = None,
    step: Step = None,
    best: Best = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn a model of UER-py, nanoGPT, transformers or this program into one of another, and compare the two."""
    from gpt2_flax.checkpoint.source import load_source
    from gpt2_flax.export.publish import compare_with_original, publish
    from gpt2_flax.export.transformers_folder import MARKER
    from gpt2_flax.export.uer_file import UER_CONFIG, write_uer
    from gpt2_flax.export.verify import NOT_VERIFIED
    from gpt2_flax.folders import check_output

    check_output(output, UER_CONFIG if format == "uer" else MARKER, overwrite)
    source = load_source(model, step, tokenizer, uer_config, Ends(bos, eos), best)
    if found := compare_with_original(model, source):
        print(f"{model}: {found}")
    if format == "uer":
        print(f"{output}: {write_uer(source, output, overwrite)}")
        return
    card = {"name": name or output.resolve().name, "language": language, "license": license}
    verification = publish(source, output, format=format, overwrite=overwrite, **card)
    print(f"{output}: {verification or NOT_VERIFIED}")


@app.command()
def push(
    folder: Annotated[Path, PathArgument(help="A folder that export has made, unchanged since.")],
    repo_id: Annotated[str, CardArgument(help="Name on the Hugging Face hub: OWNER/NAME, or NAME for your own.")],
    private: Annotated[bool, typer.Option("--private", help="Only you may see it.")] = False,
    revision: Annotated[str | None, CardText(help="Branch to put it on, made when missing; main if left out.")] = None,
) -> None:
    """Put an exported folder on the Hugging Face hub, with the token in HF_TOKEN or that of `hf auth login`."""
    from gpt2_flax.export.push import push

    print(f"{folder}: {push(folder, repo_id, private=private, revision=revision)}")
