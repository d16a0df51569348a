"""All that a report says of one run, as JSON values: the curves to draw, and what the folder of the run knows."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_flax.checkpoint.listing import list_checkpoints
from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.step_meta import DamagedCheckpoint, committed_steps, read_meta
from gpt2_flax.config.parse import config_values
from gpt2_flax.config.schema import Config
from gpt2_flax.data.dataset_info import SPLITS, read_info, sum_if_known
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model.flops import flops_per_token
from gpt2_flax.report.history import Curve, History, moving_mean, read_history, thin

_MEDIANS = ("train/tokens_per_second", "train/mfu", "train/data_wait_s")
_NOISY = {  # curves with a moving mean
    *("train/loss", "train/perplexity", "train/bits_per_character", "train/accuracy"),
    *("train/grad_norm", "train/tokens_per_second", "train/mfu", "train/data_wait_s"),
}
_NOT_DRAWN = {"train/samples", "train/target_share", "train/real_tokens_per_second"}
_MEAN_FROM = 100  # points of a curve: a moving mean of fewer points would hide more than it shows
_MOST_SAMPLES = 100  # evaluations whose texts are shown
_SAMPLE = re.compile(r"step +(\d{1,10})  (.*)")


class RunReport:
    """A run, read once.

    Raises:
        UserError: NO_INPUT if the folder is no run or has no metrics.
    """

    def __init__(self, path: Path):
        self.path, self.folder = path, RunFolder(path)
        if not (self.folder.config.is_file() or self.folder.metrics.is_file()):
            fix = "give the output folder of gpt2-flax train"
            raise UserError(ExitCode.NO_INPUT, "no run found", path, fix)
        self.history: History = read_history(self.folder)
        self.config: Config | None = self.folder.valid_config()

    def flops_per_token(self) -> tuple[int, int] | None:
        """Return the operations of training on one token before and after growth; None if a size is not known."""
        size = self.config and self.config.model.vocab_size
        if not (self.config and size):
            return None
        grown = self.config.with_vocab_size(size)
        before, after = (flops_per_token(one.model, one.data.seq_length) for one in (grown.before_growth(), grown))
        return before, after

    def growth_tokens(self) -> float:
        """Return the tokens of the steps before growth; 0 if the model does not grow."""
        steps_N = np.array([self.config.growth_steps if self.config else 0])
        return float(self.history.tokens_at(steps_N, self.config)[0]) if self.config and steps_N[0] else 0.0

    def axes(self, step_N: np.ndarray) -> dict[str, np.ndarray | None]:
        """Return the tokens, FLOPs and hours up to each step, as float64; None for what is not known."""
        if self.config is None:
            return {"tokens": None, "flops": None, "hours": None}
        tokens_N, of_token = self.history.tokens_at(step_N, self.config), self.flops_per_token()
        before_N = np.minimum(tokens_N, self.growth_tokens())
        return {
            "tokens": tokens_N,
            "flops": None if of_token is None else of_token[0] * before_N + of_token[1] * (tokens_N - before_N),
            "hours": self.history.hours_at(step_N, self.config),
        }

    def facts(self, name: str) -> dict[str, Any]:
        """Return the JSON object of the run in a report, in which the run is called `name`."""
        config, checkpoints = self.config, []
        with contextlib.suppress(UserError, OSError):  # none yet, or a run deletes an old one at this moment
            checkpoints = [one._asdict() for one in list_checkpoints(self.folder)]
        curves = self.history.curves
        size = config and config.model.vocab_size
        return {
            "name": name,
            "path": str(self.path.absolute()),
            "ended": self.history.ended,
            "last_step": self.history.last_step,
            "total_steps": config and config.training.total_steps,
            "flops_per_token": self.flops_per_token(),
            "growth_tokens": self.growth_tokens(),
            "parameters": config.model.with_vocab_size(size).parameters if config and size else None,
            "hardware": self._hardware(),
            "curves": {one: self._drawn(one, curve) for one, curve in curves.items() if one not in _NOT_DRAWN},
            "medians": {one: float(np.median(curves[one].value_N)) for one in _MEDIANS if one in curves},
            "saved": self.history.saved,
            "checkpoints": checkpoints,
            "prompts": config.training.prompts if config else [],
            "samples": self._samples(),
            "config": config and config_values(config),
            "datasets": [_dataset(*one) for one in config.data.datasets.items()] if config else [],
        }

    def _drawn(self, name: str, curve: Curve) -> dict[str, Any]:
        """Return the points of a curve that are drawn; values that are not finite are left out, and counted."""
        finite_N = np.isfinite(curve.value_N)
        step_M, value_M = curve.step_N[finite_N], curve.value_N[finite_N]
        kept = thin(step_M, value_M)
        axes = self.axes(step_M[kept])
        drawn = {"steps": step_M[kept].tolist(), "values": value_M[kept].tolist()}
        if name in _NOISY and len(value_M) >= _MEAN_FROM:
            drawn["means"] = _short(moving_mean(value_M)[kept])
        if (tokens := axes["tokens"]) is not None:
            drawn["tokens"] = tokens.astype(int).tolist()
        if (hours := axes["hours"]) is not None:
            drawn["hours"] = _short(hours)
        return drawn | {"points": len(value_M), "not_finite": int(len(finite_N) - len(value_M))}

    def _samples(self) -> list[dict[str, Any]]:
        """Return the texts of each evaluation in samples.txt; the last texts of a step count."""
        found: dict[int, list[str]] = {}
        last = -1
        with contextlib.suppress(OSError):
            if self.folder.samples.is_file():
                for line in self.folder.samples.read_text(encoding="utf-8", errors="replace").split("\n"):
                    if match := _SAMPLE.fullmatch(line):
                        step = int(match[1])
                        if step < last:  # a resumed run
                            found = {at: texts for at, texts in found.items() if at < step}
                        found.setdefault(step, []).append(match[2])
                        last = step
        each = len(self.config.training.prompts) if self.config else 0
        steps = np.array(sorted(found))
        if len(steps) > _MOST_SAMPLES:
            steps = steps[np.linspace(0, len(steps) - 1, _MOST_SAMPLES).astype(int)]
        return [{"step": step, "texts": found[step][-each:]} for step in steps.tolist()]

    def _hardware(self) -> str | None:
        for step in reversed(committed_steps(self.folder.checkpoints)):
            with contextlib.suppress(DamagedCheckpoint, OSError):
                hardware = read_meta(self.folder.checkpoints / str(step), step).get("hardware")
                return hardware if isinstance(hardware, str) else None
        return None


def names_of(paths: Iterable[Path]) -> dict[Path, str]:
    """Return a short name for each folder: its last part, or as many parts as tell it from the others."""
    resolved = {path: Path(os.path.realpath(path)) for path in paths}
    names: dict[Path, str] = {}
    for path, place in resolved.items():
        others = [other for other in resolved.values() if other != place]
        for count in range(1, len(place.parts) + 1):
            names[path] = str(Path(*place.parts[-count:]))
            if all(other.parts[-count:] != place.parts[-count:] for other in others):
                break
    return names


def _dataset(folder: str, weight: float) -> dict[str, Any]:
    """Return the counts of a dataset, and a sentence in place of the counts if the dataset cannot be read."""
    values: dict[str, Any] = {"folder": folder, "weight": weight}
    try:
        info = read_info(Path(folder))
    except UserError as error:
        return values | {"problem": str(error)}
    splits: Mapping[str, dict[str, int | None]] = {
        split: {
            "documents": sum(shard.documents for shard in info.shards[split]),
            "tokens": info.n_tokens(split),
            "characters": sum_if_known(shard.characters for shard in info.shards[split]),
        }
        for split in SPLITS
    }
    return values | {"vocab_size": info.vocab_size, "unknown_share": info.unknown_share, "splits": splits}


def _short(values: np.ndarray) -> list[float]:
    """Return derived values with six digits, which halve the size of the page."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def as_json(value: Any) -> str:
    """Return strict JSON, with null for numbers that are not finite, that may stand inside a <script>."""
    text = json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
