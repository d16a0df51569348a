"""Where a dataset is made: a folder of this machine, or one that `fsspec` reaches (`s3://bucket/name`, `gs://...`).

Both take files whole or not at all: under a temporary name on a disk, as one object elsewhere. A dataset is finished
when its dataset.json is there.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.folders import check_output, folder_lock, is_address, scratch_folder
from gpt2_flax.text.files import file_system


class Storage(Protocol):
    """A folder of files with names such as `train/tokens-00000.bin`; small enough to send to another process."""

    @property
    def where(self) -> str: ...

    def staging(self) -> contextlib.AbstractContextManager[Path]:
        """A folder of this machine to write files into, which are in place when the block ends."""
        ...

    def scratch(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A folder of this machine for files that are needed along the way; they stay if that costs nothing."""
        ...

    def names(self) -> set[str]:
        """The files that are there."""
        ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def fetched(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """The file, on this machine as long as the block lasts."""
        ...

    def remove(self, name: str) -> None: ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder on a disk, which exists."""

    path: Path

    @property
    def where(self) -> str:
        return str(self.path)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        yield self.path

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        (self.path / name).mkdir(exist_ok=True)
        yield self.path / name

    def names(self) -> set[str]:
        return {path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()}

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        yield self.path / name

    def remove(self, name: str) -> None:
        path = self.path / name
        path.unlink()
        if path.parent != self.path and not any(path.parent.iterdir()):
            path.parent.rmdir()


@dataclass(frozen=True)
class RemoteFolder:
    """A folder that `fsspec` reaches."""

    url: str

    @property
    def where(self) -> str:
        return self.url

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        with scratch_folder() as folder:
            yield folder
            files, root = file_system(self.url)
            staged = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            for path in staged:
                name = f"{root}/{path.relative_to(folder).as_posix()}"
                files.makedirs(name.rpartition("/")[0], exist_ok=True)
                files.put_file(str(path), name)

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        with scratch_folder() as folder:
            yield folder

    def names(self) -> set[str]:
        files, root = file_system(self.url)
        files.invalidate_cache()
        return {path.removeprefix(root).strip("/") for path in files.find(root)} if files.exists(root) else set()

    def read(self, name: str) -> bytes:
        files, root = file_system(self.url)
        return files.cat_file(f"{root}/{name}")

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        files, root = file_system(self.url)
        with scratch_folder() as folder:
            path = folder / "file"
            files.get_file(f"{root}/{name}", str(path))
            yield path

    def remove(self, name: str) -> None:
        files, root = file_system(self.url)
        files.rm_file(f"{root}/{name}")


@contextlib.contextmanager
def unfinished(output: str, marker: str, overwrite: bool) -> Iterator[Storage]:
    """Yields where to make `output`; it takes that name when the block ends, and is kept as it is when it fails.

    A later call is given the same place again, with all that was finished there. On a disk that is a hidden folder
    beside `output`, and a dataset of that name stays until it is replaced as a whole; elsewhere it is `output` itself.
    Raises `UserError`: CANT_CREATE when `output` exists and may not be replaced, or another process is making it.
    """
    if is_address(output):
        yield from _unfinished_remote(output.rstrip("/"), marker, overwrite)
    else:
        yield from _unfinished_local(Path(output), marker, overwrite)


def _unfinished_local(output: Path, marker: str, overwrite: bool) -> Iterator[Storage]:
    check_output(output, marker, overwrite)
    place = Path(os.path.realpath(output))  # a link stays, and what it leads to is replaced
    partial = place.with_name(f".{place.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = f"check the path and its permissions ({error.strerror})"
        raise UserError(ExitCode.CANT_CREATE, "output folder cannot be made", output, fix) from None
    with folder_lock(partial, "another process is making this dataset"):
        try:
            yield LocalFolder(partial)
            check_output(output, marker, overwrite)  # again: the work may have taken hours
            (partial / "lock").unlink()
            if place.is_dir():
                shutil.rmtree(place)
            partial.rename(place)
        except OSError as error:
            raise io_error(error, output) from error
        finally:
            if partial.is_dir() and {path.name for path in partial.iterdir()} <= {"lock"}:
                shutil.rmtree(partial)


def _unfinished_remote(url: str, marker: str, overwrite: bool) -> Iterator[Storage]:
    storage = RemoteFolder(url)
    try:
        names = storage.names()
        if marker in names and not overwrite:
            fix = "choose another name or add --overwrite"
            raise UserError(ExitCode.CANT_CREATE, "output folder exists", url, fix)
        if names and not any(name in names for name in (marker, "settings.json")):
            fix = f"it holds no {marker}, so it is not ours to add to: choose another name"
            raise UserError(ExitCode.CANT_CREATE, "output folder exists", url, fix)
        if marker in names:
            for name in sorted(names, key=lambda name: name != marker):  # a dataset without its first file is none
                storage.remove(name)
        yield storage
    except OSError as error:
        raise io_error(error, url) from error
