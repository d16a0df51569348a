"""Other programs that show the metrics of a run: TensorBoard, Weights & Biases, MLflow."""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config.parse import config_values
from gpt2_flax.config.schema import Config
from gpt2_flax.errors import ExitCode, UserError, missing_package, quote
from gpt2_flax.folders import write_whole
from gpt2_flax.input_files import parse_json
from gpt2_flax.training.tensorboard import TensorBoard

PROJECT = "gpt2_flax"  # unless the environment of the logger names another
_PARAMETERS_AT_ONCE = 100  # MLflow takes no more in one call


class Logger(Protocol):
    """A program that shows metrics; no method raises anything."""

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add the finite values of a step, with names such as `train/loss`."""

    def add_text(self, step: int, name: str, text: str) -> None:
        """Add a text in Markdown."""

    def close(self, succeeded: bool) -> None:
        """Write what is still in memory, and say whether the run has failed."""


def open_loggers(config: Config, run: RunFolder, say: Callable[[str], None]) -> list[Logger]:
    """Return the loggers that `training.logging` names. A resumed run continues what it began there.

    Raises:
        UserError: USAGE if a package is missing, IO if a logger does not start.
    """
    kinds = {"wandb": WandB, "mlflow": MLflow}
    return [
        TensorBoard(run.tensorboard, say) if name == "tensorboard" else Guarded(name, kinds[name], config, run, say)
        for name in dict.fromkeys(config.training.logging)
    ]


class Guarded:
    """A logger whose first error ends it with a warning, and never the training."""

    def __init__(
        self, name: str, kind: Callable[..., Logger], config: Config, run: RunFolder, say: Callable[[str], None]
    ):
        self._name, self._say = name, say
        try:
            self._logger: Logger | None = kind(config, run, say)
        except ImportError:
            raise missing_package(f"training.logging {name}", name, name, run.path) from None
        except Exception as error:  # each package has its own errors
            fix = f"see its documentation, or take {name} out of training.logging ({_shown(error)})"
            raise UserError(ExitCode.IO, f"{name} does not start", run.path, fix) from None

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._guard(lambda logger: logger.add_scalars(step, values))

    def add_text(self, step: int, name: str, text: str) -> None:
        self._guard(lambda logger: logger.add_text(step, name, text))

    def close(self, succeeded: bool) -> None:
        self._guard(lambda logger: logger.close(succeeded))

    def _guard(self, call: Callable[[Logger], None]) -> None:
        try:
            if self._logger is not None:
                call(self._logger)
        except Exception as error:
            self._logger = None
            self._say(f"warning: no more metrics for {self._name} ({_shown(error)}); the run continues")


class WandB:
    """Weights & Biases. `WANDB_PROJECT`, `WANDB_ENTITY` and `WANDB_MODE` mean what they mean everywhere."""

    def __init__(self, config: Config, run: RunFolder, say: Callable[[str], None]):
        import wandb

        identity = _remembered(run, "wandb", lambda: secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.path.name,
            id=identity,
            resume="allow",
            dir=run.path,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # W&B takes only rising steps, and a resumed run may repeat some.
        self._run.define_metric("*", step_metric="step")
        folder = Path(self._run.dir).parent
        say(f"wandb: {self._run.url or f'offline; to send the metrics: wandb sync {folder}'}")

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def add_text(self, step: int, name: str, text: str) -> None:
        self._run.log({"step": step, name: text})

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class MLflow:
    """MLflow: the server that `MLFLOW_TRACKING_URI` names, or else files in `RUN/mlruns`."""

    def __init__(self, config: Config, run: RunFolder, say: Callable[[str], None]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run.path.absolute() / "mlruns").as_uri()
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)

        def create() -> str:
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            identity = self._client.create_run(experiment, run_name=run.path.name).info.run_id
            values = [Param(key, str(value)) for key, value in config_values(config).items()]
            for first in range(0, len(values), _PARAMETERS_AT_ONCE):
                self._client.log_batch(identity, params=values[first : first + _PARAMETERS_AT_ONCE])
            return identity

        self._id = _remembered(run, "mlflow", create)
        self._client.update_run(self._id, status="RUNNING")
        say(f"mlflow: {uri}, run {self._id}")

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in values.items()])

    def add_text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{name}/step-{step}.md")

    def close(self, succeeded: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if succeeded else "FAILED")


def _remembered(run: RunFolder, name: str, make: Callable[[], str]) -> str:
    """Return the name of this run in a logger, from the file `loggers.json` of the run, or a new one."""
    known: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = parse_json(run.loggers.read_bytes())
    if not isinstance(known.get(name), str):
        known[name] = make()
        write_whole(run.loggers, json.dumps(known).encode())
    return known[name]


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {quote(str(error).partition(chr(10))[0], 200)}"
