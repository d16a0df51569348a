"""The metadata of a checkpoint: `STEP/meta/metadata`, JSON `{"content": ..., "sha256": ...}`.

The content has `step`, `model`, `arrays` and the fields that the writer adds. `arrays` maps `ITEM/path` to the `shape`,
`dtype` and `sum` of an array, see `device_checksum`. The sha256 is of the content as canonical JSON.
"""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_flax.errors import UserError
from gpt2_flax.folders import json_sha256
from gpt2_flax.input_files import read_whole

VALIDATION_LOSS = "validation/loss"  # the key in `metrics` of the content

# Errors about the state of the machine, not of a file.
PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)

_MOST_BYTES = 2**24
# Versions without checksums wrote the content alone, with these fields.
_OLD_FIELDS = {
    *("step", "model", "hardware", "samples_seen", "skipped"),
    *("tokenizer_fingerprint", "tokens_fingerprint", "validation_fingerprint"),
}


class DamagedCheckpoint(Exception):
    """A checkpoint differs from what was written; the message says how."""


def committed_steps(folder: Path) -> list[int]:
    """Return the steps in a folder of checkpoints, ascending; [] if there is no such folder."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object to write for `content`."""
    return {"content": content, "sha256": json_sha256(content)}


def read_meta(step_folder: Path, step: int) -> dict[str, Any]:
    """Return the content that was written for a step. Raises `DamagedCheckpoint`; OSError for one of `PASSING`."""
    try:
        written = json.loads(read_whole(step_folder / "meta" / "metadata", _MOST_BYTES))
    except (OSError, UserError, ValueError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in PASSING:
            raise
        raise DamagedCheckpoint(f"its metadata cannot be read: {str(error)[:100]}") from error
    if isinstance(written, dict) and "model" in written and written.keys() <= _OLD_FIELDS:
        return written
    if not isinstance(written, dict) or written.keys() != {"content", "sha256"}:
        raise DamagedCheckpoint("its metadata is of another form")
    content = written["content"]
    if written["sha256"] != json_sha256(content):
        raise DamagedCheckpoint("the sha256 of its metadata differs")
    if content["step"] != step:
        raise DamagedCheckpoint(f"it is step {content['step']}")
    return content
