"""What models are asked: generate."""

from typing import Annotated

import typer

from gpt2_flax.cli.app import Model, Step, app, utf8


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str], typer.Option(callback=utf8, help="Beginning of a text; repeat it for a batch.")],
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
