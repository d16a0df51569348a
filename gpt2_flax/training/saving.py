"""The checkpoints of a run: the state, and all that resuming and judging the run needs to know of it."""

import math
from collections.abc import Mapping

import jax

from gpt2_flax.checkpoint.run_folder import with_absolute_paths
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.processes.phases import Phases
from gpt2_flax.training.metrics_log import MetricsLog
from gpt2_flax.training.open_stage import Stage
from gpt2_flax.training.signals import StopRequest
from gpt2_flax.training.start import Progress
from gpt2_flax.training.step import TrainState, all_finite


class Saver:
    """Saves the state of a stage."""

    def __init__(self, stage: Stage, store: CheckpointStore, log: MetricsLog, phases: Phases, stop: StopRequest):
        config, mesh = stage.config, stage.mesh
        self._mixture, self._store, self._log = stage.mixture, store, log
        self._phases, self._stop = phases, stop
        self._output = config.output
        self._meta = {
            "model": config.model.model_dump(),
            "config": with_absolute_paths(config).model_dump(),
            "hardware": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
            **stage.mixture.fingerprints(),
        }

    def save(
        self,
        state: TrainState,
        progress: Progress,
        skipped: int,
        figures: Mapping[str, float],
        last: bool,
        stopping: bool,
    ) -> None:
        """Begin to save `state`, after the save before it has ended; wait for its end if it is the last.

        Args:
            state: the state on the devices, after step `progress.step`.
            progress: what the host knows of the run.
            skipped: skipped steps of the run so far.
            figures: losses at this step.
            last: whether this is the last save of this process, which must succeed.
            stopping: whether the process was asked to stop, and so does not wait for checksums of the data.

        Raises:
            UserError: DIVERGED when the state is not finite, DATA when a dataset is damaged or has changed, IO when
                the disk refuses a save that must succeed.
        """
        meta = self._meta | progress._asdict() | {"best": progress.best._asdict(), "skipped": skipped}
        meta["metrics"] = {name: value for name, value in figures.items() if math.isfinite(value)}
        with self._phases.during("save", progress.step), self._log.screen.doing(f"saving step {progress.step:,}"):
            self._mixture.wait_until_verified(patience=0 if stopping else 10)
            self._mixture.check_unchanged()
            if not jax.device_get(all_finite(state)):
                fix = "lower optimizer.learning_rate or raise optimizer.warmup; the newest checkpoint is from before"
                what = f"parameters are not finite after step {progress.step}"
                raise UserError(ExitCode.DIVERGED, what, self._output, fix)
            self._log.committed(self._store.seal())
            self._store.save(progress.step, state.model, state.opt_state, meta)
            if last or self._stop.measures_save:
                self._log.committed(self._store.seal(must=last))  # before a line says that it is saved
