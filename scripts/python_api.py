"""Write docs/python-api.md from the docstrings of the public names: python scripts/python_api.py [FILE]"""

import collections.abc
import functools
import inspect
import re
import sys
import textwrap
import types
import typing
from pathlib import Path

import gpt2_flax
from gpt2_flax.inference.evaluation import Evaluation

NAMES = [
    "load",
    "Model",
    "Evaluation",
    "train",
    "Run",
    "prepare",
    "Dataset",
    "train_tokenizer",
    "UserError",
    "ExitCode",
]
INTRODUCTION = """# Python

<!-- Made by scripts/python_api.py from the docstrings: change them instead. -->

Everything here is a name of `gpt2_flax`. `import gpt2_flax` takes no time; functions import JAX when they need it.
Defaults and messages are the same as on the command line: where a message names an option, such as
`--batch-size`, the argument is `batch_size`. A path is a string or a `pathlib.Path`.

A failure that you can fix is a [`UserError`](#usererror). Its message is a sentence with what to do, and its
`exit_code` is the exit code of the command line. Messages and figures are printed as on the command line;
`contextlib.redirect_stdout` catches them.

`load` and `train` set up the process as the command line does: compiled programs are kept in `~/.cache/gpt2_flax`, and
on a CPU, memory that is free is kept for the next step. Import `gpt2_flax` before you use JAX for other things.

[tutorial.ipynb](tutorial.ipynb) goes from text to a model in ten cells.
"""
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?:    .*\n|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^([\w, ]+): ((?:.*)(?:\n    .*)*)", re.MULTILINE)


def joined(text: str) -> str:
    """Return a text in one line."""
    return " ".join(text.split())


def type_name(annotation: object) -> str:
    """Return the type of an argument for a reader."""
    if isinstance(annotation, str):
        return annotation.replace("np.", "numpy.")
    if annotation in (inspect.Parameter.empty, typing.Any):
        return ""
    if typing.get_origin(annotation) is typing.Annotated:
        return type_name(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f'"{one}"' for one in typing.get_args(annotation))
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        parts = " or ".join(type_name(one) for one in typing.get_args(annotation))
        return parts.replace("str or os.PathLike[str]", "path")
    if typing.get_origin(annotation) is collections.abc.Sequence:
        return f"Sequence[{type_name(typing.get_args(annotation)[0])}]"
    name = "None" if annotation is type(None) else inspect.formatannotation(annotation)
    return name.replace("collections.abc.", "").replace("typing.", "")


def describe(docstring: str | None, parameters: typing.Mapping[str, inspect.Parameter]) -> str:
    """Return a docstring in Markdown."""
    text = inspect.cleandoc(docstring or "") + "\n"
    lines = [SECTION.sub("", text).strip()]
    for title, body in SECTION.findall(text):
        if title in ("Returns", "Yields"):
            lines += ["", f"**{title}:** {joined(body)}"]
            continue
        lines += ["", f"**{title.replace('Args', 'Arguments')}**", ""]
        for names, meaning in ENTRY.findall(textwrap.dedent(body)):
            found = parameters.get(names) if title == "Args" else None
            kind = type_name(found.annotation) if found else ""
            shown = ", ".join(f"`{name}`" for name in names.split(", "))
            lines.append(f"* {shown}{f' ({kind})' if kind else ''}: {joined(meaning)}")
    return "\n".join(lines)


def signature(name: str, function: typing.Callable, bound: bool) -> str:
    """Return a call with the names and defaults of all arguments, as a block of code."""
    parameters = list(inspect.signature(function).parameters.values())[bound:]
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in parameters]
    line = f"{name}{inspect.Signature(plain)}"
    if len(line) > 100:
        line = f"{name}(\n    " + ",\n    ".join(str(inspect.Signature(plain))[1:-1].split(", ")) + ",\n)"
    return "```python\n" + line.replace("'", '"') + "\n```"


def members(of: type) -> typing.Iterator[tuple[str, object]]:
    """Yield the public properties and methods of a class in the order of the source."""
    for name, value in vars(of).items():
        if not name.startswith("_") and isinstance(value, property | functools.cached_property | types.FunctionType):
            yield name, value


def page() -> str:
    """Return the whole document."""
    parts = [INTRODUCTION]
    for name in NAMES:
        found = Evaluation if name == "Evaluation" else getattr(gpt2_flax, name)
        parts.append(f"## {name}\n")
        if found is gpt2_flax.ExitCode:
            parts.append(inspect.cleandoc(found.__doc__ or "") + "\n\n| name | code | meaning |\n|---|---|---|")
            comments = {"OK": "success"} | dict(
                re.findall(r"^    (\w+) = .*?# (.*)$", inspect.getsource(found), re.MULTILINE)
            )
            parts[-1] += "".join(
                f"\n| `{one.name}` | {one.value} | {comments.get(one.name, 'ended by a signal')} |" for one in found
            )
            continue
        if not inspect.isclass(found):
            parts += [
                signature(f"gpt2_flax.{name}", found, False),
                describe(found.__doc__, inspect.signature(found).parameters),
            ]
            continue
        made = inspect.signature(found.__init__).parameters if "__init__" in vars(found) else {}
        if found in (gpt2_flax.Dataset, gpt2_flax.Run):
            parts.append(signature(f"gpt2_flax.{name}", found.__init__, True))
        parts.append(describe(found.__doc__, made))
        for member, value in members(found):
            if isinstance(value, types.FunctionType):
                parts += [f"### {name}.{member}\n", signature(f"{name.lower()}.{member}", value, True)]
                parts.append(describe(value.__doc__, inspect.signature(value).parameters))
            else:
                get = value.fget if isinstance(value, property) else value.func
                parts.append(f"### {name}.{member}\n\n{describe(get.__doc__, {})}")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "docs/python-api.md"
    target.write_text(page(), encoding="utf-8")
