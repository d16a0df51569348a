"""Training: `train`, and the `Run` that it makes."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gpt2_flax.api.arguments import LocalPath, Positive, Rows, Step, checked
from gpt2_flax.api.load import load
from gpt2_flax.api.model import Model
from gpt2_flax.api.set_up import set_up_jax
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.input_files import MOST_ROWS


@checked
def train(
    config: LocalPath | Mapping[str, Any] | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    on_step: Callable[[dict[str, float]], object] | None = None,
    allow_change: Sequence[str] = (),
    profile: Step = 0,
    max_hours: Annotated[float, Field(gt=0, le=MOST_ROWS)] | None = None,
    quiet: bool = False,
    coordinator: str | None = None,
    num_processes: Rows | None = None,
    process_id: Annotated[int, Field(ge=0, le=MOST_ROWS)] | None = None,
) -> "Run":
    """Train a model, or resume a run that stopped; print what the command line prints.

    In the main thread, the first Ctrl-C stops the run after the current step, and saves; the same call resumes.

    Args:
        config: The name of a config of the package, such as `base`; a TOML or JSON file; or a mapping with the same
            sections and keys: `{"model": {"n_layer": 4}}`, or `{"model.n_layer": 4}`. A config may have several stages.
            None if `overrides` have all values.
        overrides: Values that replace values of the config, by key: `{"data.dataset": "data/mine"}`, or
            `["data.dataset=data/mine"]` as on the command line. `stages.2.data.seq_length` is a key of the second
            stage.
        on_step: Called after each step with its record: `step`, `train/loss`, `train/learning_rate` and others, named
            as in `Run.records`. The call comes one step late, so that the devices never wait for it. Of several
            processes, only process 0 calls it. An exception of it ends the run.
        allow_change: Keys of the config that may differ from the run that is resumed.
        profile: The number of steps to trace for TensorBoard or XProf.
        max_hours: Save and stop within this many hours.
        quiet: Print only warnings.
        coordinator: Several hosts: HOST:PORT of process 0.
        num_processes: Several hosts: the number of processes.
        process_id: Several hosts: the number of this process.

    Returns:
        The run, of several stages the last one.

    Raises:
        UserError: TRY_AGAIN if the run was stopped, and has saved; CONFIG for a wrong config; DIVERGED if the loss is
            not finite; other codes as the sentence says.
    """
    begun = time.monotonic()
    from gpt2_flax.config.file import load_stages
    from gpt2_flax.processes.place import find_place
    from gpt2_flax.processes.watchdog import announced

    place = find_place(coordinator, num_processes, process_id)
    with announced(place):  # the import of JAX may fail on one host
        set_up_jax()
        from gpt2_flax.processes.launch import start_processes
        from gpt2_flax.training.loop import train as run

    deadline = math.inf if max_hours is None else begun + 3600 * max_hours
    with start_processes(place) as watchdog:
        # Here, so that a bad config in one process ends all.
        stages = load_stages(Path(config) if isinstance(config, str | os.PathLike) else config, overrides)
        run(
            *stages,
            allow_change=allow_change,
            profile_steps=profile,
            watchdog=watchdog,
            deadline=deadline,
            quiet=quiet,
            on_step=on_step,
        )
    return Run(stages[-1].output)


class Run:
    """The folder of a run, which may still be training. It is a path too: `gpt2_flax.load(run)`.

    Args:
        path: The run folder.

    Attributes:
        path: The run folder, a `pathlib.Path`.

    Raises:
        UserError: NO_INPUT if there is no run.
    """

    @checked
    def __init__(self, path: LocalPath):
        from gpt2_flax.checkpoint.run_folder import RunFolder

        self.path = Path(path)
        self._folder = RunFolder(self.path)
        if not (self._folder.config.is_file() or self._folder.checkpoints.is_dir()):
            raise UserError(ExitCode.NO_INPUT, "no run found", self.path, "give the output of a training")

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __repr__(self) -> str:
        return f"<Run {self.path}: checkpoints {', '.join(map(str, self.steps)) or 'none'}>"

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config, as nested dictionaries.

        Raises:
            UserError: NO_INPUT if the run has none, like a run that `gpt2-flax import` made.
        """
        found = self._folder.read_config()
        if found is None:
            raise UserError(ExitCode.NO_INPUT, "no config", self._folder.config, "take a run that was trained")
        return found.model_dump(exclude_none=True)

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, in ascending order."""
        from gpt2_flax.checkpoint.step_meta import committed_steps

        return sorted(committed_steps(self._folder.checkpoints))

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl in the order of writing: `step`, `time`, and metrics such as `train/loss`.

        The records of evaluations have `validation/loss` and others. A resumed run may repeat steps; the last record of
        a step counts.
        """
        return list(self._folder.records())

    def load(self, *, step: int | None = None, best: bool = False, average: int = 1) -> Model:
        """Load the model of a checkpoint; arguments as in `gpt2_flax.load`."""
        return load(self.path, step=step, best=best, average=average)

    @checked
    def export(
        self, output: LocalPath, *, step: Step | None = None, best: bool = False, average: Positive = 1, **options: Any
    ) -> str:
        """Export the model of a checkpoint as a `transformers` folder; see `Model.export`.

        Args:
            output: The new folder.
            step: The checkpoint; None for the newest.
            best: Take the checkpoint with the lowest validation loss.
            average: Average the weights of this many checkpoints: the one to take and those before it.
            options: Further arguments of `Model.export`.

        Returns:
            A sentence that says what was compared, with the largest difference found.
        """
        return self.load(step=step, best=best, average=average).export(output, **options)
