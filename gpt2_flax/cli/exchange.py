"""Commands that exchange models with other programs: export, import, convert, push."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from gpt2_flax.cli.app import (
    Average,
    Best,
    Bos,
    Eos,
    Model,
    ModelArgument,
    Overwrite,
    PathArgument,
    PathOption,
    Place,
    Revision,
    Step,
    TextArgument,
    TextOption,
    app,
)
from gpt2_flax.folders import check_output
from gpt2_flax.tokenizers.special_tokens import Ends

Title = Annotated[str | None, TextOption(help="Title of the model card. Default: the folder's name.")]
Language = Annotated[str | None, TextOption(help="Language code for the model card, such as zh.")]
License = Annotated[str | None, TextOption(help="License for the model card, such as apache-2.0.")]
ItsTokenizer = Annotated[
    Path | None, PathOption("--tokenizer", help="vocab.txt or a tokenizer folder, if the model has none.")
]
UerConfig = Annotated[Path | None, PathOption(help="The config.json of a UER-py model, with its number of heads.")]


@app.command()
def export(
    model: Model,
    output: Annotated[Path, PathArgument(help="The new folder for transformers.")],
    step: Step = None,
    best: Best = False,
    average: Average = 1,
    revision: Revision = None,
    format: Annotated[
        Literal["safetensors", "bin", "gguf"],
        Option(help="bin and gguf add pytorch_model.bin or model.gguf to model.safetensors."),
    ] = "safetensors",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Option(help="Type of the weights.")] = "float32",
    max_shard_size: Annotated[str, TextOption(help="Size limit of a shard of weights, such as 500MB.")] = "5GB",
    name: Title = None,
    language: Language = None,
    license: License = None,
    prompt: Annotated[str | None, TextOption(help="Example for the model card. Default: from the run.")] = None,
    dataset: Annotated[
        list[str] | None, TextOption(help="Hub name of a dataset, for the model card; repeatable.")
    ] = None,
    hardware: Annotated[str | None, TextOption(help="Hardware, for the model card. Default: from the run.")] = None,
    card_extra: Annotated[Path | None, PathOption(help="Markdown file to append to the model card.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Export a model as a transformers folder, and check that it computes the same there."""
    from gpt2_flax.api.load import load
    from gpt2_flax.export.transformers_folder import MARKER
    from gpt2_flax.export.weight_files import shard_size

    shard_size(max_shard_size)
    check_output(output, MARKER, overwrite)
    compared = load(model, step=step, best=best, average=average, revision=revision).export(
        output,
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        name=name,
        language=language,
        license=license,
        prompt=prompt,
        dataset=dataset,
        hardware=hardware,
        card_extra=card_extra,
        overwrite=overwrite,
    )
    print(f"{output}: {compared}")


@app.command(name="import")
def import_(
    model: Annotated[
        Place,
        ModelArgument(help="A transformers folder, OWNER/NAME on the hub, a .bin of UER-py, a ckpt.pt of nanoGPT."),
    ],
    output: Annotated[Path, PathArgument(help="The new run folder, for init_from, generate and other commands.")],
    tokenizer: ItsTokenizer = None,
    uer_config: UerConfig = None,
    bos: Bos = None,
    eos: Eos = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Import a GPT-2 of transformers, UER-py, TencentPretrain or nanoGPT, for training or any other use."""
    from gpt2_flax.checkpoint.source import IMPORTED, compare_with_original, load_source, save_as_run

    check_output(output, IMPORTED, overwrite)
    source = load_source(model, None, tokenizer, uer_config, Ends(bos, eos), revision=revision)
    compared = f", {found}" if (found := compare_with_original(model, source)) else ""
    save_as_run(source, output, overwrite)
    print(f"{output}: {len(source.weights)} parameter arrays of {model}{compared}")


@app.command()
def convert(
    model: Annotated[
        Place,
        ModelArgument(help="A file of UER-py or nanoGPT, a transformers folder, a run, or OWNER/NAME on the hub."),
    ],
    output: Annotated[Path, PathArgument(help="The new folder for transformers, or with --format uer for UER-py.")],
    format: Annotated[
        Literal["safetensors", "bin", "gguf", "uer"],
        Option(help="bin and gguf add a file to model.safetensors; uer writes model.bin for UER-py."),
    ] = "safetensors",
    tokenizer: ItsTokenizer = None,
    uer_config: UerConfig = None,
    bos: Bos = None,
    eos: Eos = None,
    name: Title = None,
    language: Language = None,
    license: License = None,
    step: Step = None,
    best: Best = False,
    average: Average = 1,
    revision: Revision = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a model of UER-py, nanoGPT, transformers or this program to another format, and compare the two."""
    from gpt2_flax.checkpoint.source import compare_with_original, load_source
    from gpt2_flax.export.publish import publish
    from gpt2_flax.export.transformers_folder import MARKER
    from gpt2_flax.export.verify import NOT_VERIFIED
    from gpt2_flax.formats.registry import writer

    check_output(output, writer("uer").MARKER if format == "uer" else MARKER, overwrite)
    source = load_source(model, step, tokenizer, uer_config, Ends(bos, eos), best, revision, average)
    if found := compare_with_original(model, source):
        print(f"{model}: {found}")
    if format == "uer":
        print(f"{output}: {writer('uer').write_folder(source, output, overwrite)}")
        return
    card = {"name": name or output.resolve().name, "language": language, "license": license}
    verification = publish(source, output, format=format, overwrite=overwrite, **card)
    print(f"{output}: {verification or NOT_VERIFIED}")


@app.command()
def push(
    folder: Annotated[Path, PathArgument(help="A folder made by export, unchanged.")],
    repo_id: Annotated[str, TextArgument(help="Name on the Hugging Face hub: OWNER/NAME, or NAME for your account.")],
    private: Annotated[bool, Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, TextOption(help="Branch, made if it is missing. Default: main.")] = None,
) -> None:
    """Upload an exported folder to the Hugging Face hub, with the token in HF_TOKEN or of `hf auth login`."""
    from gpt2_flax.export.push import push

    print(f"{folder}: {push(folder, repo_id, private=private, revision=revision)}")
