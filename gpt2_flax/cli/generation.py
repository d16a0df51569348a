"""What models are asked: generate, serve."""

import importlib.util
import itertools
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gpt2_flax.cli.app import Model, PathOption, Step, app, utf8


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option(callback=utf8, help="Beginning of a text; repeat it for a batch.")
    ] = None,
    prompt_file: Annotated[Path | None, PathOption(help="A file with a prompt on each line; - reads stdin.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many texts to make of each prompt.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="Lower is safer; 0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only the K likeliest tokens; 0 for all.")] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Only the likeliest that share this much.")] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Only tokens with this part of the likeliest's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(min=1.0, help="Above 1 avoids what was said before.")] = 1.0,
    no_repeat_ngram: Annotated[int, typer.Option(min=0, help="No N tokens in a row come twice; 0 allows it.")] = 0,
    allow_unknown: Annotated[bool, typer.Option("--allow-unknown", help="Let the model say [UNK].")] = False,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Show text as it comes; by default for one text on a terminal."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same text.")] = 0,
    step: Step = None,
) -> None:
    """Continue texts."""
    from gpt2_flax.cli.prompts import read_prompts, warn_of_unknown
    from gpt2_flax.errors import ExitCode, UserError

    prompts = [*(prompt or ()), *(read_prompts(prompt_file) if prompt_file else ())]
    if not prompts:
        raise UserError(ExitCode.USAGE, "no prompt", "generate", "give --prompt TEXT or --prompt-file FILE")
    one = len(prompts) == samples == 1
    if stream and not one:
        what = f"--stream is for one text, and this makes {len(prompts) * samples}"
        raise UserError(ExitCode.USAGE, what, "generate", "leave it out, or give one prompt and one sample")
    from gpt2_flax.cpu import tune_cpu

    tune_cpu()
    from gpt2_flax.checkpoint.source import load_source
    from gpt2_flax.inference.generate import Generator, with_text_only
    from gpt2_flax.inference.sampling import Sampling

    generator = Generator(load_source(model, step))
    warn_of_unknown(generator.tokenizer, prompts)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram)
    sampling = with_text_only(sampling, generator.tokenizer, generator.decoder.cfg.vocab_size, unknown=allow_unknown)
    if stream or (stream is None and one and sys.stdout.isatty()):
        pieces = generator.stream(prompts[0], max_new_tokens, sampling, seed)
        for piece in itertools.chain(prompts, pieces):
            print(piece, end="", flush=True)
        print()
        return
    for text in generator.texts_in_turn(prompts, max_new_tokens, sampling, seed, samples):
        print(text, flush=True)


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(callback=utf8, help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes one that is free.")] = 8000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens that a text may ask for.")] = 512,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Most requests that run or wait.")] = 4,
    step: Step = None,
) -> None:
    """Serve a page to play with, and OpenAI's /v1/completions.

    One text is made at a time, the others wait for their turn. Ctrl-C, SIGTERM and signals like it end it, with 0.
    """
    from gpt2_flax.errors import missing_package

    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise missing_package("serve", missing[0], "serve", "this environment")
    from gpt2_flax.cpu import tune_cpu

    tune_cpu()
    from gpt2_flax.checkpoint.source import load_source
    from gpt2_flax.serve.completion import Limits
    from gpt2_flax.serve.server import listen
    from gpt2_flax.serve.server import serve as run

    path = Path(os.path.realpath(model))
    name = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
    limits = Limits(max_tokens=max_tokens, max_concurrent=max_concurrent)
    with listen(host, port) as listener:  # first, because it is what fails most and takes no time
        run(load_source(model, step), name, listener, limits)
