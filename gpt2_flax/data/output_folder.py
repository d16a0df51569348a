"""The folder in which a dataset is made: on this machine, or at an address that `fsspec` knows (`s3://bucket/name`).

In both, a file appears whole or not at all: it is renamed on a disk, and written as one object elsewhere. A dataset is
finished when its dataset.json exists. Files are named relative to the folder, such as `train/tokens-00000.bin`.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.folders import check_output, folder_lock, is_address, scratch_folder
from gpt2_flax.text.files import file_system


@dataclass(frozen=True)
class LocalFolder:
    """A folder on a disk, which exists."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """Yield a local folder; the files that the block writes into it are in this folder when the block ends."""
        yield self.path

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """Yield a local folder for intermediate files; they are kept if that costs nothing."""
        (self.path / name).mkdir(exist_ok=True)
        yield self.path / name

    def names(self) -> set[str]:
        return {path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()}

    def read(self, name: str) -> bytes:
        """Return the content of a file; raises FileNotFoundError."""
        return (self.path / name).read_bytes()

    @contextlib.contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """Yield a local path of the file, which is valid until the block ends."""
        yield self.path / name

    def remove(self, name: str) -> None:
        path = self.path / name
        path.unlink()
        if path.parent != self.path and not any(path.parent.iterdir()):
            path.parent.rmdir()


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at an address, with the methods of `LocalFolder`."""

    url: str

    def __str__(self) -> str:
        return self.url

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        with scratch_folder() as folder:
            yield folder
            files, root = file_system(self.url)
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
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
            files.get_file(f"{root}/{name}", str(folder / "file"))
            yield folder / "file"

    def remove(self, name: str) -> None:
        files, root = file_system(self.url)
        files.rm_file(f"{root}/{name}")


OutputFolder = LocalFolder | RemoteFolder


@contextlib.contextmanager
def unfinished(output: str, marker: str, overwrite: bool) -> Iterator[OutputFolder]:
    """Yield the folder in which `output` is made; it becomes `output` when the block ends, and is kept if it fails.

    A later call gets the same folder, with all files that were finished. On a disk it is a hidden folder beside
    `output`, and a dataset of that name stays until it is replaced as a whole. Elsewhere it is `output` itself.

    Raises:
        UserError: CANT_CREATE if `output` exists and may not be replaced, or if another process is making it.
    """
    if is_address(output):
        yield from _unfinished_remote(output.rstrip("/"), marker, overwrite)
    else:
        yield from _unfinished_local(Path(output), marker, overwrite)


def _unfinished_local(output: Path, marker: str, overwrite: bool) -> Iterator[LocalFolder]:
    check_output(output, marker, overwrite)
    place = Path(os.path.realpath(output))  # a link stays, and its target is replaced
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


def _unfinished_remote(url: str, marker: str, overwrite: bool) -> Iterator[RemoteFolder]:
    folder = RemoteFolder(url)
    try:
        names = folder.names()
        if marker in names and not overwrite:
            fix = "choose another name or add --overwrite"
            raise UserError(ExitCode.CANT_CREATE, "output folder exists", url, fix)
        if names and not any(name in names for name in (marker, "settings.json")):
            fix = f"it holds no {marker}, so it is not ours to add to: choose another name"
            raise UserError(ExitCode.CANT_CREATE, "output folder exists", url, fix)
        if marker in names:
            for name in sorted(names, key=lambda name: name != marker):  # the marker first: without it, no dataset
                folder.remove(name)
        yield folder
    except OSError as error:
        raise io_error(error, url) from error
