"""The curves of the loss as a PNG file, drawn by matplotlib, for documents and slides."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from gpt2_flax.checkpoint.step_meta import VALIDATION_LOSS
from gpt2_flax.errors import missing_package
from gpt2_flax.report.history import TRAIN_LOSS, moving_mean

if TYPE_CHECKING:
    from gpt2_flax.report.facts import RunReport

_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC")


def loss_figure(runs: Mapping[str, "RunReport"]) -> bytes:
    """Return a PNG file with the training loss and the validation loss of named runs against steps.

    Raises:
        UserError: USAGE if matplotlib is not installed.
    """
    try:
        from matplotlib import font_manager, rc_context
        from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    except ImportError:
        raise missing_package("--png", "matplotlib", "report", "gpt2-flax report") from None
    known = {font.name for font in font_manager.fontManager.ttflist}
    with rc_context({"font.family": [font for font in _FONTS if font in known]}):
        figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
        axes = figure.subplots()
        for number, (name, run) in enumerate(runs.items()):
            curves, color = run.history.curves, f"C{number % 10}"
            label = name.replace("$", r"\$")  # else matplotlib reads mathematics
            if (train := curves.get(TRAIN_LOSS)) is not None:
                finite_N = np.isfinite(train.value_N)
                step_N, value_N = train.step_N[finite_N], train.value_N[finite_N]
                axes.plot(step_N, value_N, color=color, alpha=0.25, linewidth=0.8)
                axes.plot(step_N, moving_mean(value_N), color=color, linewidth=1.5, label=f"{label}, train")
            if (validation := curves.get(VALIDATION_LOSS)) is not None:
                axes.plot(*validation, "o--", color=color, markersize=3.5, label=f"{label}, validation")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a token)")
        axes.grid(alpha=0.25)
        axes.legend()
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()
