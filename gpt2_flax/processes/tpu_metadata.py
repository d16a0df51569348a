"""What the metadata server of a Google Cloud TPU VM says about the VMs of its slice."""

import contextlib
import http.client
import os
import time
from pathlib import Path
from typing import NamedTuple

from gpt2_flax.accelerators import has_tpu
from gpt2_flax.errors import ExitCode, UserError, quote

_PRODUCT = Path("/sys/class/dmi/id/product_name")
_TIMEOUT = 2.0  # seconds; the server is on the same machine
_TRIES = 3
_LARGEST = 2**20  # bytes; a slice has hundreds of hosts


class Slice(NamedTuple):
    hosts: list[str]
    """Addresses of the VMs of this slice, in the order of their numbers."""
    number: int
    """Of this VM in its slice."""
    variables: dict[str, str]
    """What the VM was set up with, such as MEGASCALE_NUM_SLICES."""


def may_be_tpu_vm() -> bool:
    """Whether to ask the metadata server: no machine without a TPU, or of another cloud, waits for it."""
    if os.environ.get("TPU_SKIP_MDS_QUERY") or not has_tpu():
        return False
    return _is_google() or not _product() or any(name.startswith("TPU_") for name in os.environ)


def slice_of_this_vm() -> Slice | None:
    """Returns the slice that this machine belongs to, None when the server does not know of any.

    Raises OSError when the server does not answer, `UserError` (USAGE) when its answer is not understood.
    """
    number, workers = _attribute("agent-worker-number"), _attribute("worker-network-endpoints")
    if not number or not workers:
        return None
    # In one format a list of hosts, in an older one of name:id:address.
    parts = [worker.strip().split(":") for worker in workers.split(",")]
    if not number.isdecimal() or not all(len(part) in (1, 3) and part[-1] for part in parts):
        what = f"its agent-worker-number {quote(number)} or worker-network-endpoints {quote(workers)} is not understood"
        fix = "give --coordinator, --num-processes and --process-id"
        raise UserError(ExitCode.USAGE, what, server(), fix)
    lines = [line.partition(":") for line in (_attribute("tpu-env") or "").splitlines()]
    variables = {name.strip(): value.strip().strip("'\"") for name, _, value in lines}
    return Slice([part[-1] for part in parts], int(number), variables)


def server() -> str:
    """Returns the address of the metadata server, which the variables of Google's own libraries may replace."""
    return os.environ.get("GCE_METADATA_HOST") or os.environ.get("GCE_METADATA_IP") or "169.254.169.254"


def _attribute(name: str) -> str | None:
    """Returns an attribute of this VM, None when it has none of that name. Raises OSError."""
    for last in [False] * (_TRIES - 1 if _is_google() else 0) + [True]:
        try:
            with contextlib.closing(http.client.HTTPConnection(server(), timeout=_TIMEOUT)) as connection:
                path = f"/computeMetadata/v1/instance/attributes/{name}"
                connection.request("GET", path, headers={"Metadata-Flavor": "Google"})
                answer = connection.getresponse()
                if answer.headers.get("Metadata-Flavor") != "Google":
                    raise OSError("another server answers")
                if answer.status == 404:
                    return None
                if answer.status != 200:
                    raise OSError(f"it answers {answer.status}")
                return answer.read(_LARGEST).decode("utf-8", "replace").strip()
        except (OSError, http.client.HTTPException) as error:
            if last:
                raise OSError(str(error)) from error
            time.sleep(_TIMEOUT / 4)
    return None


def _is_google() -> bool:
    return "Google" in _product()


def _product() -> str:
    try:
        return _PRODUCT.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
