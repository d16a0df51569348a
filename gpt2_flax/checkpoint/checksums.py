"""SHA256SUMS, the checksums of the files of a folder; `sha256sum -c` reads it too."""

import re
from collections.abc import Iterable
from pathlib import Path

from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.folders import file_sha256
from gpt2_flax.input_files import CONFIG_BYTES, read_whole

SUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(folder: Path) -> None:
    """Write the checksums of all files in `folder`, sorted by name."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path, names: Iterable[str]) -> None:
    """Raise `UserError` (DATA) for the first of `names` that differs from its checksum, if it has one."""
    path = folder / SUMS
    expected = read_sums(path) if path.is_file() else {}
    for name in names:
        if name in expected and file_sha256(folder / name) != expected[name]:
            fix = f"copy or export it again; if it was changed on purpose, delete {SUMS}"
            raise UserError(ExitCode.DATA, "damaged file (sha256 differs)", folder / name, fix)


def read_sums(path: Path) -> dict[str, str]:
    """Return the checksums in a SHA256SUMS by file name. Raises `UserError` (DATA) for other content."""
    fix = "copy or export the folder again, or delete this file"
    try:
        lines = read_whole(path, CONFIG_BYTES).decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(ExitCode.DATA, f"{SUMS} is not text", path, fix) from None
    sums = {}
    for number, line in enumerate(lines, 1):
        found = _LINE.fullmatch(line)
        if not found:
            raise UserError(ExitCode.DATA, f"not a checksum: {quote(line)}", f"{path}:{number}", fix)
        sums[found[2]] = found[1]
    return sums
