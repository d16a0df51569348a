"""The folder of a run, and every file name in it.

config.toml                  the resolved config, with absolute paths
tokenizer/                   a copy of the dataset's tokenizer, so that the run can be used without the dataset
checkpoints/                 see `store`
damaged/                     damaged files that are not used; a user may delete them
metrics.jsonl tensorboard/   metrics over the run
crash-TIME-PROCESS.log       stacks and tracebacks of a process that died, hung or had a bug, see `crash_log`
report.html                  the page about the run, written when the run ends, see `report`
loggers.json                 the names of the run in Weights & Biases and MLflow, see `training.loggers`
wandb/ mlruns/               the files of these two
samples.txt                  the continuation of each of `training.prompts` at each evaluation
lock                         held by the process that trains
token                        exists for a moment while several processes check that all of them see the same folder
"""

import contextlib
import filecmp
import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from gpt2_flax.checkpoint.step_meta import committed_steps
from gpt2_flax.config.file import load_config
from gpt2_flax.config.parse import dump_config
from gpt2_flax.config.schema import Config
from gpt2_flax.errors import ExitCode, UserError, naming_file
from gpt2_flax.folders import HubModel, check_link, folder_lock, is_address, write_whole

SIGHT = 15.0  # seconds until other hosts see a new file; NFS caches the content of a folder
SAVED = "checkpoint"  # the key, in a record of metrics.jsonl, of the step that was committed


def set_aside(path: Path, run: Path) -> Path:
    """Move a damaged file or folder to the first free name in `damaged/` of its run; return the new path."""
    place = RunFolder(run).damaged
    place.mkdir(exist_ok=True)
    target = next(new for number in itertools.count() if not (new := place / f"{path.name}-{number}").exists())
    return path.rename(target)


def run_of_checkpoint(path: Path) -> Path | None:
    """Return RUN if `path` is RUN/checkpoints/STEP, else None."""
    return path.parent.parent if path.parent.name == "checkpoints" and path.name.isdecimal() else None


def check_model(path: Path | HubModel) -> Path | HubModel:
    """Return `path` if it may hold a model: a file, a `transformers` folder, a run, or RUN/checkpoints/STEP.

    A model on the hub is not checked. This function does not import jax, so a wrong name is reported at once. Raises
    `UserError` (NO_INPUT).
    """
    if isinstance(path, HubModel):
        return path
    run = RunFolder(run_of_checkpoint(path) or path)
    if not (path.is_file() or (path / "config.json").is_file() or run.checkpoints.is_dir()):
        fix = "give a run, RUN/checkpoints/STEP, a transformers folder, a .bin of UER-py or a ckpt.pt of nanoGPT"
        fix += ", or hf://OWNER/NAME on the Hugging Face hub"
        raise UserError(ExitCode.NO_INPUT, "no model found", path, fix)
    return path


class RunFolder:
    """The paths in a run. Only methods touch the disk."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.damaged = self.path / "damaged"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.loggers = self.path / "loggers.json"
        self.samples = self.path / "samples.txt"
        self.report = self.path / "report.html"
        self.token = self.path / "token"

    def create(self) -> None:
        """Make the folder. Raises `UserError` (CANT_CREATE) if that fails or the folder is not a run."""
        check_link(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            foreign = any(self.path.iterdir()) and not (self.config.exists() or (self.path / "lock").exists())
            writable = os.access(self.path, os.W_OK)
        except OSError as error:
            fix = f"check the path and its permissions ({error.strerror})"
            raise UserError(ExitCode.CANT_CREATE, "output folder cannot be made", self.path, fix) from None
        if foreign:
            fix = "it holds files but no config.toml of a run: choose another output"
            raise UserError(ExitCode.CANT_CREATE, "output folder exists and is not a run", self.path, fix)
        if not writable:
            raise UserError(ExitCode.CANT_CREATE, "output folder is not writable", self.path, "check its permissions")

    @contextlib.contextmanager
    def removed_if_refused(self) -> Iterator[None]:
        """Remove a folder that the block made or found empty, if it raises `UserError` before a file has content."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        was_empty = self.path in missing or (self.path.is_dir() and not any(self.path.iterdir()))
        try:
            yield
        except UserError:
            with contextlib.suppress(UserError, OSError):
                files = (path for path in self.path.rglob("*") if path.is_file() and path.name != "lock")
                if was_empty and not any(file.stat().st_size for file in files):
                    with self.lock():  # fails if another process has begun a run here
                        for path in self.path.iterdir():
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
                for folder in missing:
                    folder.rmdir()
            raise

    def lock(self) -> AbstractContextManager[None]:
        """Lock the folder until the block ends, see `folder_lock`."""
        return folder_lock(self.path, "another process trains in this folder")

    @contextlib.contextmanager
    def showing(self, token: str) -> Iterator[None]:
        """Lock the folder, and keep a file with `token` in it, until the block ends."""
        with self.lock():
            write_whole(self.token, token.encode())
            try:
                yield
            finally:
                self.token.unlink(missing_ok=True)

    def check_shows(self, token: str) -> None:
        """Wait for the `token` that another process shows. Raises `UserError` (CONFIG) if it does not appear."""
        patience = time.monotonic() + SIGHT
        while self._shown() != token.encode():
            if time.monotonic() > patience:
                what = f"run folder is not shared: host {socket.gethostname()} does not see what process 0 writes there"
                fix = "choose an output on storage that all hosts share"
                raise UserError(ExitCode.CONFIG, what, self.path.absolute(), fix)
            time.sleep(0.2)

    def _shown(self) -> bytes | None:
        for folder in (self.path.parent, self.path):  # NFS asks its server when a folder is listed
            with contextlib.suppress(OSError):
                list(folder.iterdir())
        try:
            return self.token.read_bytes()
        except OSError:
            return None

    def write_config(self, config: Config, tokenizer: Path) -> None:
        """Write the resolved config with absolute paths, and copy the tokenizer the first time."""
        write_whole(self.config, dump_config(with_absolute_paths(config)).encode())
        if not self.tokenizer.exists():
            # Under another name first, so that no partial copy remains.
            temporary = self.path / "tokenizer.tmp"
            temporary.mkdir(exist_ok=True)
            for file in tokenizer.iterdir():
                with naming_file(temporary / file.name):
                    shutil.copyfile(file, temporary / file.name)
            temporary.rename(self.tokenizer)

    def check_tokenizer(self, tokenizer: Path, tell: Callable[[str], object]) -> None:
        """Set the run's copy of the tokenizer aside if it differs from `tokenizer`, the dataset's."""
        files = [file.name for file in tokenizer.iterdir()]
        if self.tokenizer.exists() and filecmp.cmpfiles(tokenizer, self.tokenizer, files, shallow=False)[0] != files:
            moved = set_aside(self.tokenizer, self.path)
            tell(f"warning: {self.tokenizer} differs from that of the dataset, moved to {moved}; copied again")

    def valid_config(self) -> Config | None:
        """Return the config of the run, None if there is no valid config.toml."""
        with contextlib.suppress(UserError):
            return self.read_config()
        return None

    def read_config(self) -> Config | None:
        """Return the config of the run, None for a new run."""
        return load_config(self.config) if self.config.exists() else None

    def last_checkpoint(self) -> int | None:
        """Return the newest committed step, None if there is none."""
        return max(committed_steps(self.checkpoints), default=None)

    def metrics_at(self, step: int) -> dict[str, float]:
        """Return the newest value of each metric up to `step`."""
        newest: dict[str, float] = {}
        for record in self.records():
            newest |= record if record["step"] <= step else {}
        return newest

    def last_step(self) -> int | None:
        """Return the highest step in the last 64 KiB of metrics.jsonl, None if there is none."""
        return max((record["step"] for record in self.records(last=2**16)), default=None)

    def lost_checkpoint(self) -> int | None:
        """Return the newest step that was ever committed if no checkpoint is left, else None."""
        saved = [record[SAVED] for record in self.records() if type(record.get(SAVED)) is int]
        for folder in (self.damaged, self.path / "sha256"):  # old versions made a folder sha256
            names = [path.name.partition("-")[0].partition(".")[0] for path in folder.glob("*")]
            saved += [int(name) for name in names if name.isdecimal()]
        return None if self.last_checkpoint() is not None else max(saved, default=None)

    def records(self, last: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield the records of metrics.jsonl, or of its `last` bytes; skip lines with other content."""
        if not self.metrics.is_file():
            return
        with open(self.metrics, "rb") as file:
            if last is not None:
                file.seek(max(0, self.metrics.stat().st_size - last))
            for line in file:
                with contextlib.suppress(ValueError):  # a kill or the seek may have cut a line
                    record = from_json(line)
                    if isinstance(record, dict) and type(record.get("step")) is int:
                        yield record


def with_absolute_paths(config: Config) -> Config:
    """Return a config with absolute paths, which has the same meaning in every folder."""
    folders = {str(Path(folder).absolute()): weight for folder, weight in config.data.datasets.items()}
    dataset = next(iter(folders)) if isinstance(config.data.dataset, str) else folders
    places: dict[str, Any] = {"data": config.data.model_copy(update={"dataset": dataset})}
    for name in ("output", "init_from"):
        if (place := getattr(config, name)) is not None and not is_address(place):
            places[name] = str(Path(place).absolute())
    return config.model_copy(update=places)
