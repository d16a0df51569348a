"""The curves of a run from its metrics.jsonl, and the points of a curve that a screen can show.

Letters of array names: N points of a curve, one for each step that has a value, in ascending order.
"""

import contextlib
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from gpt2_flax.checkpoint.run_folder import SAVED, RunFolder
from gpt2_flax.config.schema import Config
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.input_files import MOST_STEPS

TRAIN_LOSS = "train/loss"  # only the records of steps have it
_SLICES = 500  # about one for two pixels of a wide screen
_WINDOW = 0.02  # of all points of a curve: the width of the moving mean


class Curve(NamedTuple):
    """The values of a metric."""

    step_N: np.ndarray
    """int64, ascending."""
    value_N: np.ndarray
    """float64; may be NaN or infinite."""


class History(NamedTuple):
    """What metrics.jsonl says of a run."""

    curves: Mapping[str, Curve]
    saved: list[int]
    """Steps whose checkpoint was committed, although it may have been deleted later."""
    ended: float | None
    """Time of the newest record, in seconds since 1970."""

    @property
    def last_step(self) -> int:
        return max(int(curve.step_N[-1]) for curve in self.curves.values())

    def tokens_at(self, step_N: np.ndarray, config: Config) -> np.ndarray:
        """Return the positions that the run has read up to each step, as float64: rows times seq_length."""
        rows = config.data.global_batch_size
        samples = self.curves.get("train/samples")
        if samples is None:
            return step_N * float(rows * config.data.seq_length)
        step_M, samples_M = np.append(0, samples.step_N), np.append(0.0, samples.value_N)
        beyond_N = np.maximum(step_N - step_M[-1], 0) * rows  # an evaluation may be newer than the last line of a step
        return (np.interp(step_N, step_M, samples_M) + beyond_N) * config.data.seq_length

    def hours_at(self, step_N: np.ndarray, config: Config) -> np.ndarray | None:
        """Return the hours of training up to each step, as float64; None if the run has not measured its speed.

        Only steps count: no evaluation, no compilation, and no pause between a stop and a resume.
        """
        speed = self.curves.get("train/tokens_per_second")
        if speed is None:
            return None
        tokens_M = np.diff(self.tokens_at(speed.step_N, config), prepend=0.0)
        seconds_M = np.divide(tokens_M, speed.value_N, out=np.zeros_like(tokens_M), where=speed.value_N > 0)
        hours_M = np.append(0.0, np.cumsum(seconds_M) / 3600)
        return np.interp(step_N, np.append(0, speed.step_N), hours_M)


def read_history(run: RunFolder) -> History:
    """Read metrics.jsonl. The last record of a step counts; lines that are cut off or no records are skipped.

    A resumed run repeats the steps after its checkpoint. Its first repeated step ends all that was recorded of later
    steps before.

    Raises:
        UserError: NO_INPUT if there is no step and no evaluation.
    """
    columns: dict[str, _Column] = defaultdict(_Column)
    last, ended, saved = -1, None, set[int]()
    for record in run.records():
        step = record.pop("step")
        if not 0 <= step <= MOST_STEPS:
            continue
        ended = _number(record.pop("time", ended))
        if record.pop(SAVED, None) is not None:
            saved.add(step)
        if TRAIN_LOSS in record:
            if step <= last:
                saved = {one for one in saved if one < step}
                for column in columns.values():
                    column.end_before(step)
            last = step
        for name, value in record.items():
            if (number := value if type(value) is float else _number(value)) is not None:
                columns[name].add(step, number)
    curves = {name: Curve(np.array(one.steps), np.array(one.values)) for name, one in columns.items() if one.steps}
    if not curves:
        fix = "start the run, or wait until it has logged a step"
        raise UserError(ExitCode.NO_INPUT, "run has no metrics yet", run.metrics, fix)
    return History(curves, sorted(saved), ended)


def thin(step_N: np.ndarray, value_N: np.ndarray, slices: int = _SLICES) -> np.ndarray:
    """Return the ascending indices of the points to draw: all points, or at most 4 * `slices` + 2 of them.

    Both ends stay. So do the lowest and the highest point in each of `slices` equal parts of the linear axis, and of
    the logarithmic axis, of steps. Values must be finite.
    """
    if len(step_N) <= 4 * slices:
        return np.arange(len(step_N))
    kept = [np.array([0, len(step_N) - 1])]
    for place_N in (step_N.astype(float), np.log(np.maximum(step_N, 1))):
        share_N = (place_N - place_N[0]) * slices / (place_N[-1] - place_N[0])
        part_N = np.minimum(share_N, slices - 1).astype(int)
        order_N = np.lexsort((value_N, part_N))  # by part, then by value
        border = np.flatnonzero(np.diff(part_N[order_N]))
        kept += [order_N[np.append(0, border + 1)], order_N[np.append(border, len(order_N) - 1)]]
    return np.unique(np.concatenate(kept))


def moving_mean(value_N: np.ndarray) -> np.ndarray:
    """Return the mean of the 2% of all points around each point.

    At the end there are fewer points after it; at the beginning, where a loss falls fast, also fewer points before it.
    """
    index_N, reach = np.arange(len(value_N)), int(len(value_N) * _WINDOW / 2)
    first_N = np.maximum(index_N - reach, 0)
    end_N = np.minimum(np.minimum(index_N + reach, 2 * index_N), len(value_N) - 1) + 1
    sums = np.append(0.0, np.cumsum(value_N))
    return (sums[end_N] - sums[first_N]) / (end_N - first_N)


class _Column:
    """The values of a metric by ascending step, in arrays, because a run may have millions."""

    def __init__(self) -> None:
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        if self.steps and step <= self.steps[-1]:
            self.end_before(step)
        self.steps.append(step)
        self.values.append(value)

    def end_before(self, step: int) -> None:
        place = bisect_left(self.steps, step)
        del self.steps[place:], self.values[place:]


def _number(value: Any) -> float | None:
    """Return a value of a record as a number, None if it is none. NaN and infinity are strings in metrics.jsonl."""
    if type(value) in (int, float) or value in ("nan", "inf", "-inf"):
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            return float(value)
    return None
