"""Write docs/cli.md and docs/configuration.md from the commands and the config keys: python scripts/generate_docs.py"""

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic_core import PydanticUndefined

from gpt2_flax.cli import app
from gpt2_flax.config.parse import config_keys

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTE = "<!-- Written by scripts/generate_docs.py: change the program, then run the script. -->"

CLI = f"""{NOTE}

# Commands

`gpt2-flax COMMAND --help` prints the same. Paths are files and folders on this machine, and `~` stands for the home
folder. Addresses such as `s3://bucket/x` work for a corpus and for `prepare --output`. If an output path is a link to a
folder, the linked folder is written. Every command except `train` replaces its output folder as a whole. Give such a
command a folder inside a mounted volume, not the volume itself.

A MODEL is a run folder, `RUN/checkpoints/STEP`, a `transformers` folder, or `OWNER/NAME` on the Hugging Face hub. In a
run folder, commands read the newest checkpoint, the one that `--step N` names, or the `--best`.

Errors are one sentence, and [exit codes](exit_codes.md) say what kind of error it is. `gpt2-flax --debug COMMAND` shows
the traceback too. `gpt2-flax --install-completion` lets the shell complete commands and options.
"""

CONFIGURATION = f"""{NOTE}

# Configuration

A config is a TOML or JSON file, or one of the package. `section.key=value` on the command line overrides a key; the
value is TOML, and a bare word is a string. `gpt2-flax keys` prints the same list. A config may have several
[stages](training.md#stages). The run folder keeps the resolved config, which is a valid config itself.

```bash
gpt2-flax train quickstart optimizer.learning_rate=0.01 'training.prompts=["从前"]'
```

The defaults of `optimizer` below are the defaults of Muon. `optimizer.name = "adamw"` changes four of them: a learning
rate of 6e-4, `cosine`, a warm-up of 0.1, and weight decay of 0.1.
"""


def cli_page() -> str:
    """Return docs/cli.md."""
    commands: dict[str, Any] = vars(typer.main.get_command(app))["commands"]
    parts = [CLI]
    for name, command in commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        rows = [_parameter_row(*parameter.get_help_record(context)) for parameter in command.params]
        table = ["", "| argument, option | meaning | default, bounds |", "|---|---|---|", *rows] if rows else []
        parts.append("\n".join([f"## {name}", "", _paragraphs(command.help), *table, ""]))
    return "\n".join(parts)


def _parameter_row(name: str, help: str) -> str:
    """Return a row of a table for what --help says in two columns: `--samples <int range>`, `Number.  [default: 1]`."""
    option, _, kind = name.partition(" <")
    if option.startswith("--"):
        words = {"Path": "PATH", "str": "TEXT", "list[str]": "TEXT", "list[Path]": "PATH", "int range": "N"}
        kind = kind.removesuffix(">")
        option += f" {' or '.join(kind.split('|')) if '|' in kind else words.get(kind, 'X')}" if kind else ""
    else:
        option = option if option.startswith("[") else option.upper()
    meaning, _, notes = help.removesuffix("]").partition("  [")
    limits = "; ".join(_shown(note) for note in notes.split("; ") if note)
    return f"| `{_cell(option)}` | {_cell(meaning)} | {limits} |"


def _shown(note: str) -> str:
    """Return a note of --help: `required`, `default: 1`, or bounds such as `0<=x<=1`, without a bound that is huge."""
    if note.startswith("default: "):
        return f"`{note.removeprefix('default: ')}`"
    low, high = re.fullmatch(r"(?:(.+)<=)?x(?:<=(.+))?", note).groups("") if "x" in note.split("<=") else ("", "")
    high = "" if high and float(high) > 10**6 else high
    words = [f"at least {low}" if low else "", f"at most {high}" if high else ""]
    return note if note == "required" else ", ".join(filter(None, words))


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def configuration_page() -> str:
    """Return docs/configuration.md."""
    sections: dict[str, list[str]] = {}
    for key, field in config_keys().items():
        section = key.rpartition(".")[0] or "the run"
        default = "required" if field.default is PydanticUndefined else _toml(field.default)
        kinds, bounds = " or ".join(_kinds(field.annotation)), [*_bounds(field.metadata)]
        values = ", ".join([kinds.replace("whole number or number", "number"), *bounds])
        sections.setdefault(section, []).append(f"| `{key}` | {default} | {values} | {_cell(field.description)} |")
    head = ["", "| key | default | values | meaning |", "|---|---|---|---|"]
    return "\n".join([CONFIGURATION, *("\n".join([f"## {name}", *head, *rows, ""]) for name, rows in sections.items())])


def _toml(value: object) -> str:
    if value is None:
        return ""
    text = str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
    return f"`{text}`"


def _kinds(annotation: Any) -> Iterator[str]:
    """Yield the types and the choices of a value."""
    origin = get_origin(annotation)
    if origin is Literal:
        yield from (f"`{_toml(choice).strip('`')}`" for choice in get_args(annotation))
    elif origin in (types.UnionType, Union):
        for member in get_args(annotation):
            if member is not type(None):
                yield from _kinds(member)
    elif hasattr(annotation, "__metadata__"):  # Annotated, inside a union
        yield " ".join([*_kinds(annotation.__origin__), *_bounds(_constraints(annotation.__metadata__))])
    else:
        names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
        yield names.get(annotation) or {list: "list of texts", dict: "table"}[origin]


def _constraints(metadata: Any) -> Iterator[Any]:
    for one in metadata:
        yield from getattr(one, "metadata", [one])


def _bounds(metadata: Any) -> Iterator[str]:
    """Yield the bounds of a number that say something; the largest ones keep arithmetic from overflowing."""
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    for one in metadata:
        for name, word in words.items():
            if (bound := getattr(one, name, None)) is not None and bound < 10**6:
                yield f"{word} {bound:g}"


PAGES = {"cli.md": cli_page, "configuration.md": configuration_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(DOCS / name)
