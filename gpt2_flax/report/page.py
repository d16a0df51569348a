"""Reports about runs: one HTML file that needs no network, a CSV file of all curves, and a figure."""

import base64
import csv
import hashlib
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic_core import PydanticUndefined

import gpt2_flax
from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config.parse import config_keys
from gpt2_flax.errors import ExitCode, UserError, io_error, printable
from gpt2_flax.folders import check_link, write_whole
from gpt2_flax.report.facts import RunReport, as_json, names_of
from gpt2_flax.report.figure import loss_figure

_HERE = Path(__file__).parent
_SCRIPTS = ("texts.js", "chart.js", "page.js")  # one script in the page
_OURS = b"<!doctype html>\n<!-- report of gpt2_flax -->\n"  # how a file begins that may be replaced


def report(
    paths: Sequence[Path], output: Path, table: Path | None = None, figure: Path | None = None, overwrite: bool = False
) -> list[Path]:
    """Write a report about runs, and return the files that were written.

    Args:
        paths: run folders.
        output: HTML file to write; an older report is replaced.
        table: CSV file to write, with every point of every curve.
        figure: PNG file to write, with the curves of the loss.
        overwrite: whether other files may be replaced.

    Raises:
        UserError: NO_INPUT for a folder that is no run or has no metrics; CANT_CREATE for a file that cannot be
            written or must not be replaced; USAGE if two outputs are the same file, or matplotlib is missing.
    """
    outputs = [path for path in (output, table, figure) if path is not None]
    for path in outputs:
        _check_file(path, overwrite)
    if len(set(map(os.path.realpath, outputs))) < len(outputs):
        raise UserError(ExitCode.USAGE, "two outputs have the same name", output, "give each of them its own")
    distinct = list({os.path.realpath(path): path for path in paths}.values())
    names = names_of(distinct)
    runs = {names[path]: RunReport(path) for path in distinct}
    contents = [page(runs).encode()]
    if table is not None:
        contents.append(csv_of(runs).encode("utf-8-sig"))  # a spreadsheet knows UTF-8 by its mark
    if figure is not None:
        contents.append(loss_figure(runs))
    for path, content in zip(outputs, contents, strict=True):
        try:
            write_whole(path, content)
        except OSError as error:
            raise io_error(error, path) from None
    return outputs


def report_at_end(run: RunFolder, say: Callable[[str], object]) -> None:
    """Write the report of a run into its folder. A run never fails because of its report: `say` gets a warning."""
    try:
        report([run.path], run.report)
    except Exception as error:
        say(f"warning: no report: {printable(str(error)) or type(error).__name__}")


def page(runs: dict[str, RunReport]) -> str:
    """Return a report as HTML; `runs` have names. Nothing in it loads anything, or runs text of a run."""
    defaults = {key: field.default for key, field in config_keys().items()}
    data = {
        "program": f"gpt2_flax {gpt2_flax.__version__}",
        "written": time.time(),
        "defaults": {key: None if value is PydanticUndefined else value for key, value in defaults.items()},
        "runs": [run.facts(name) for name, run in runs.items()],
    }
    style = _HERE.joinpath("page.css").read_text(encoding="utf-8")
    script = "\n".join(_HERE.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    parts = {"STYLE": style, "SCRIPT": script, "DATA": as_json(data)}
    parts |= {"STYLE-HASH": _csp_hash(style), "SCRIPT-HASH": _csp_hash(script)}
    pieces = _HERE.joinpath("page.html").read_text(encoding="utf-8").split("@@")  # text, name, text, name, ..., text
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def csv_of(runs: dict[str, RunReport]) -> str:
    """Return CSV with a line for each run and step, and a column for each metric. A value that is missing is empty."""
    metrics = sorted({name for run in runs.values() for name in run.history.curves})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "step", "tokens", "flops", "hours", *metrics])
    for name, run in runs.items():
        curves = run.history.curves
        steps = np.unique(np.concatenate([curve.step_N for curve in curves.values()]))
        axes = [[None] * len(steps) if axis is None else axis.tolist() for axis in run.axes(steps).values()]
        values = [
            dict(zip(*map(np.ndarray.tolist, curves[one]), strict=True)) if one in curves else {} for one in metrics
        ]
        for step, *along in zip(steps.tolist(), *axes, strict=True):
            writer.writerow([name, step, *along, *(value.get(step) for value in values)])
    return text.getvalue()


def _csp_hash(text: str) -> str:
    """Return the source of a Content-Security-Policy that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _check_file(path: Path, overwrite: bool) -> None:
    """Raise `UserError` (CANT_CREATE) if a file cannot be written, or exists, is no report and must be kept."""
    check_link(path)
    if not path.name or path.is_dir():
        raise UserError(ExitCode.CANT_CREATE, "output is a folder", path, "give the name of a file")
    above = next(folder for folder in Path(os.path.realpath(path)).parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise UserError(ExitCode.CANT_CREATE, "output cannot be written", path, f"check {above} and its mode")
    if not os.path.lexists(path) or (overwrite and path.is_file()):
        return
    try:
        if path.is_file():
            with open(path, "rb") as file:
                if file.read(len(_OURS)) == _OURS:
                    return
    except OSError as error:
        raise io_error(error, path) from None
    fix = "choose another name or add --overwrite" if path.is_file() else "choose another name"
    raise UserError(ExitCode.CANT_CREATE, "output exists and is not a report", path, fix)
