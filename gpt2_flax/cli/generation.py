"""Commands that generate text: generate, serve."""

import importlib.util
import itertools
import os
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from gpt2_flax.cli.app import Average, Best, Model, PathOption, Revision, Step, TextOption, app
from gpt2_flax.errors import ExitCode, UserError, io_error, missing_package
from gpt2_flax.folders import HubModel
from gpt2_flax.input_files import MOST_POSITIONS, MOST_ROWS, MOST_TOKENS, VOCABULARY_BYTES, read_whole


@app.command()
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, TextOption(help="Beginning of a text; repeatable.")] = None,
    prompt_file: Annotated[Path | None, PathOption(help="File with one prompt a line; - reads standard input.")] = None,
    samples: Annotated[int, Option(min=1, max=MOST_ROWS, help="Number of texts for each prompt.")] = 1,
    max_new_tokens: Annotated[int, Option(min=1, max=MOST_POSITIONS, help="Maximum number of new tokens.")] = 100,
    temperature: Annotated[
        float, Option(min=0.0, max=1000.0, help="Higher: more varied text; 0: the most likely token.")
    ] = 1.0,
    top_k: Annotated[int, Option(min=0, max=MOST_TOKENS, help="Sample from the K most likely tokens; 0: all.")] = 50,
    top_p: Annotated[float, Option(min=0.0, max=1.0, help="Keep the top tokens up to this total probability.")] = 1.0,
    min_p: Annotated[float, Option(min=0.0, max=1.0, help="Skip tokens below this share of the best one.")] = 0.0,
    repetition_penalty: Annotated[
        float, Option(min=1.0, max=1000.0, help="Above 1: make tokens of the text so far less likely.")
    ] = 1.0,
    no_repeat_ngram: Annotated[
        int, Option(min=0, max=MOST_POSITIONS, help="Never repeat a sequence of N tokens; 0: allow.")
    ] = 0,
    allow_unknown: Annotated[bool, Option("--allow-unknown", help="Allow [UNK] in the text.")] = False,
    stream: Annotated[
        bool | None,
        Option("--stream/--no-stream", help="Print text as it is generated. Default: for one text on a terminal."),
    ] = None,
    seed: Annotated[int, Option(min=0, max=2**32 - 1, help="The same seed gives the same text.")] = 0,
    step: Step = None,
    best: Best = False,
    average: Average = 1,
    revision: Revision = None,
) -> None:
    """Generate continuations of texts."""
    prompts = [*(prompt or ()), *(_read_prompts(prompt_file) if prompt_file else ())]
    if not prompts:
        raise UserError(ExitCode.USAGE, "no prompt", "generate", "give --prompt TEXT or --prompt-file FILE")
    one = len(prompts) == samples == 1
    if stream and not one:
        what = f"--stream is for one text, and this makes {len(prompts) * samples}"
        raise UserError(ExitCode.USAGE, what, "generate", "leave it out, or give one prompt and one sample")
    from gpt2_flax.cpu import tune_cpu

    tune_cpu()
    from gpt2_flax.checkpoint.source import load_source
    from gpt2_flax.inference.generate import Generator, unknown_warning, with_text_only
    from gpt2_flax.inference.sampling import Sampling

    generator = Generator(load_source(model, step, best=best, average=average, revision=revision))
    if warning := unknown_warning(generator.tokenizer, prompts):
        print(f"warning: {warning}", file=sys.stderr)
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


def _read_prompts(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file that are not blank; `-` means standard input.

    Raises:
        UserError: NO_INPUT if there is no file or no prompt in it; DATA for a line that is not UTF-8.
    """
    where = "stdin" if str(path) == "-" else path
    try:
        data = sys.stdin.buffer.read() if where == "stdin" else read_whole(path, VOCABULARY_BYTES)
    except FileNotFoundError:
        raise UserError(ExitCode.NO_INPUT, "file of prompts not found", path, "check the name") from None
    except OSError as error:
        raise io_error(error, path) from None
    lines = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            lines.append(line.decode().removesuffix("\r"))
        except UnicodeDecodeError:
            what, fix = "prompt that is not UTF-8", "convert the file with: iconv -t UTF-8"
            raise UserError(ExitCode.DATA, what, f"{where}:{number}", fix) from None
    if prompts := [line for line in lines if line.strip()]:
        return prompts
    raise UserError(ExitCode.NO_INPUT, "no prompt in the file", where, "write one on each line")


@app.command()
def serve(
    model: Model,
    host: Annotated[str, TextOption(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0: any free port.")] = 8000,
    max_tokens: Annotated[int, Option(min=1, max=MOST_POSITIONS, help="Maximum of max_tokens in a request.")] = 512,
    max_concurrent: Annotated[int, Option(min=1, max=MOST_ROWS, help="Limit of running and queued requests.")] = 4,
    step: Step = None,
    best: Best = False,
    average: Average = 1,
    revision: Revision = None,
) -> None:
    """Serve a web page for experiments, and OpenAI's /v1/completions.

    The server generates one text at a time; other requests are queued. Ctrl-C, SIGTERM and similar signals end the
    server with exit code 0.
    """
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise missing_package("serve", missing[0], "serve", "this environment")
    from gpt2_flax.cpu import tune_cpu

    tune_cpu()
    from gpt2_flax.checkpoint.source import load_source
    from gpt2_flax.serve.completion import Limits
    from gpt2_flax.serve.server import listen
    from gpt2_flax.serve.server import serve as run

    if isinstance(model, HubModel):
        name = model.repo_id
    else:
        path = Path(os.path.realpath(model))
        name = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
    limits = Limits(max_tokens=max_tokens, max_concurrent=max_concurrent)
    with listen(host, port) as listener:  # first, because this step fails most often and takes no time
        run(load_source(model, step, best=best, average=average, revision=revision), name, listener, limits)
