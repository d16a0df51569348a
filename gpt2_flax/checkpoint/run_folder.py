"""A run's folder, and every file name in it.

config.toml                  the resolved config, with absolute paths
tokenizer/                   the dataset's, so that the run can be used without the dataset
checkpoints/                 see `store`
damaged/                     what was damaged and is not used; it may be deleted
metrics.jsonl tensorboard/   numbers over the run
crash-TIME-PROCESS.log       stacks and tracebacks of a process that died, hung or had a bug, see `crash_log`
samples.txt                  how each evaluation continued `training.prompts`
lock                         held by the process that trains
token                        for a moment at the start of several processes: do all see the same folder?
"""

import contextlib
import filecmp
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from gpt2_flax.checkpoint.step_meta import committed_steps
from gpt2_flax.config import Config, dump_config
from gpt2_flax.config_file import load_config
from gpt2_flax.errors import ExitCode, UserError, naming_file
from gpt2_flax.folders import check_link, folder_lock, write_whole

SIGHT = 15.0  # seconds in which other hosts see a new file; NFS keeps what it knows of a folder for some
SAVED = "checkpoint"  # in a record of metrics.jsonl: the step that was committed


def set_aside(path: Path, run: Path) -> Path:
    """Move a damaged file or folder to `damaged/` of its run, under the first free name, which is returned."""
    place = RunFolder(run).damaged
    place.mkdir(exist_ok=True)
    target = next(new for number in itertools.count() if not (new := place / f"{path.name}-{number}").exists())
    return path.rename(target)


def check_model(path: Path) -> Path:
    """Returns `path` where a model may be: a file, a `transformers` folder, a run, or RUN/checkpoints/STEP.

    Needs no jax, so that a wrong name is seen at once. Raises `UserError` (NO_INPUT) where nothing of the kind is.
    """
    run = path.parent.parent if path.parent.name == "checkpoints" and path.name.isdecimal() else path
    if not (path.is_file() or (path / "config.json").is_file() or RunFolder(run).checkpoints.is_dir()):
        fix = "give a run, RUN/checkpoints/STEP, a transformers folder, a .bin of UER-py or a ckpt.pt of nanoGPT"
        raise UserError(ExitCode.NO_INPUT, "no model found", path, fix)
    return path


class RunFolder:
    """Names the parts of a run; nothing is touched until a method says so."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.damaged = self.path / "damaged"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.samples = self.path / "samples.txt"
        self.token = self.path / "token"

    def create(self) -> None:
        """Makes the folder. Raises `UserError` (CANT_CREATE) when that fails or it holds something that is no run."""
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
        """Removes what the block made in a new or empty folder when it raises `UserError` before a file has content."""
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        was_empty = self.path in missing or (self.path.is_dir() and not any(self.path.iterdir()))
        try:
            yield
        except UserError:
            with contextlib.suppress(UserError, OSError):
                if was_empty and not any(file.stat().st_size for file in self._files() if file.name != "lock"):
                    with self.lock():  # else another process has begun a run here
                        for path in self.path.iterdir():
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
                for folder in missing:
                    folder.rmdir()
            raise

    def _files(self) -> Iterator[Path]:
        return (path for path in self.path.rglob("*") if path.is_file())

    def lock(self) -> AbstractContextManager[None]:
        """Keeps other processes out until the block ends, see `folder_lock`."""
        return folder_lock(self.path, "another process trains in this folder")

    @contextlib.contextmanager
    def showing(self, token: str) -> Iterator[None]:
        """Keeps a file that holds `token` in the folder, and other runs out, until the block ends; see `lock`."""
        with self.lock():
            write_whole(self.token, token.encode())
            try:
                yield
            finally:
                self.token.unlink(missing_ok=True)

    def check_shows(self, token: str) -> None:
        """Raises `UserError` (CONFIG) unless `token`, which another process shows, comes into sight."""
        patience = time.monotonic() + SIGHT
        while self._shown() != token.encode():
            if time.monotonic() > patience:
                what = f"run folder is not shared: host {socket.gethostname()} does not see what process 0 writes there"
                fix = "choose an output on storage that all hosts share"
                raise UserError(ExitCode.CONFIG, what, self.path.absolute(), fix)
            time.sleep(0.2)

    def _shown(self) -> bytes | None:
        for folder in (self.path.parent, self.path):  # listing it makes NFS ask the server
            with contextlib.suppress(OSError):
                list(folder.iterdir())
        try:
            return self.token.read_bytes()
        except OSError:
            return None

    def write_config(self, config: Config, tokenizer: Path) -> None:
        """Writes the resolved config with absolute paths, and copies the tokenizer the first time."""
        write_whole(self.config, dump_config(with_absolute_paths(config)).encode())
        if not self.tokenizer.exists():
            # Under another name first: a tokenizer that was copied in part would stay.
            temporary = self.path / "tokenizer.tmp"
            temporary.mkdir(exist_ok=True)
            for file in tokenizer.iterdir():
                with naming_file(temporary / file.name):
                    shutil.copyfile(file, temporary / file.name)
            temporary.rename(self.tokenizer)

    def check_tokenizer(self, tokenizer: Path, tell: Callable[[str], object]) -> None:
        """Set the run's copy of the tokenizer aside if it differs from the dataset's `tokenizer`."""
        files = [file.name for file in tokenizer.iterdir()]
        if self.tokenizer.exists() and filecmp.cmpfiles(tokenizer, self.tokenizer, files, shallow=False)[0] != files:
            moved = set_aside(self.tokenizer, self.path)
            tell(f"warning: {self.tokenizer} differs from that of the dataset, moved to {moved}; copied again")

    def has_config(self) -> bool:
        """Returns whether config.toml is there and is a config."""
        with contextlib.suppress(UserError):
            return self.read_config() is not None
        return False

    def read_config(self) -> Config | None:
        """Returns the config of the run so far, None for a new one."""
        return load_config(self.config) if self.config.exists() else None

    def last_checkpoint(self) -> int | None:
        """Returns the newest step that was saved, None when there is none."""
        return max(committed_steps(self.checkpoints), default=None)

    def metrics_at(self, step: int) -> dict[str, float]:
        """Returns the newest value of each metric up to `step`, {} when there are none."""
        newest: dict[str, float] = {}
        for record in self._records():
            newest |= record if record["step"] <= step else {}
        return newest

    def last_step(self) -> int | None:
        """Return the highest step in the last 64 KiB of metrics.jsonl, None when there is none."""
        return max((record["step"] for record in self._records(last=2**16)), default=None)

    def lost_checkpoint(self) -> int | None:
        """Returns the newest step that was ever committed if no checkpoint is there, None if none ever was."""
        saved = [record[SAVED] for record in self._records() if type(record.get(SAVED)) is int]
        for folder in (self.damaged, self.path / "sha256"):  # the latter is of older versions
            names = [path.name.partition("-")[0].partition(".")[0] for path in folder.glob("*")]
            saved += [int(name) for name in names if name.isdecimal()]
        return None if self.last_checkpoint() is not None else max(saved, default=None)

    def _records(self, last: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields the records of metrics.jsonl, or of its last bytes; passes over lines of any other content."""
        if not self.metrics.is_file():
            return
        with open(self.metrics, "rb") as file:
            if last is not None:
                file.seek(max(0, self.metrics.stat().st_size - last))
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):  # cut short by a kill, or by the seek
                    record = json.loads(line)
                    if isinstance(record, dict) and type(record.get("step")) is int:
                        yield record


def with_absolute_paths(config: Config) -> Config:
    """Returns the config that means the same wherever it is read."""
    folders = {str(Path(folder).absolute()): weight for folder, weight in config.data.datasets.items()}
    dataset = next(iter(folders)) if isinstance(config.data.dataset, str) else folders
    places: dict[str, Any] = {"data": config.data.model_copy(update={"dataset": dataset})}
    for name in ("output", "init_from"):
        if (place := getattr(config, name)) is not None:
            places[name] = str(Path(place).absolute())
    return config.model_copy(update=places)
