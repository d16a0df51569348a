"""Ask the metadata server of a Google Cloud TPU VM for the VMs of its slice."""

import contextlib
import http.client
import os
import time
from pathlib import Path
from typing import NamedTuple

from gpt2_flax.accelerators import has_tpu
from gpt2_flax.errors import ExitCode, UserError, quote

PRODUCT = Path("/sys/class/dmi/id/product_name")
TIMEOUT = 2.0  # seconds; the server is on the same machine
_TRIES = 3
_LARGEST = 2**20  # bytes; a slice has hundreds of hosts


class Slice(NamedTuple):
    hosts: list[str]
    """Addresses of the VMs of the slice, in the order of their numbers."""
    number: int
    """The number of this VM in the slice."""
    variables: dict[str, str]
    """The settings of the VM, such as MEGASCALE_NUM_SLICES."""


def may_be_tpu_vm() -> bool:
    """Return whether to ask the metadata server; machines without a TPU and of other clouds must not wait for it."""
    if os.environ.get("TPU_SKIP_MDS_QUERY") or not has_tpu():
        return False
    return _is_google() or not _product() or any(name.startswith("TPU_") for name in os.environ)


def slice_of_this_vm() -> Slice | None:
    """Return the slice of this VM, or None if the server knows no slice.

    Raises:
        OSError: when the server does not answer.
        UserError: USAGE, when the answer has an unknown format.
    """
    number, workers = _attribute("agent-worker-number"), _attribute("worker-network-endpoints")
    if not number or not workers:
        return None
    # One format is a list of hosts, an older format is a list of name:id:address.
    endpoints = [worker.strip().split(":") for worker in workers.split(",")]
    if not number.isdecimal() or not all(len(fields) in (1, 3) and fields[-1] for fields in endpoints):
        what = f"its agent-worker-number {quote(number)} or worker-network-endpoints {quote(workers)} is not understood"
        fix = "give --coordinator, --num-processes and --process-id"
        raise UserError(ExitCode.USAGE, what, server(), fix)
    lines = [line.partition(":") for line in (_attribute("tpu-env") or "").splitlines()]
    variables = {name.strip(): value.strip().strip("'\"") for name, _, value in lines}
    return Slice([fields[-1] for fields in endpoints], int(number), variables)


def server() -> str:
    """Return the address of the metadata server; the variables of Google's libraries replace the default."""
    return os.environ.get("GCE_METADATA_HOST") or os.environ.get("GCE_METADATA_IP") or "169.254.169.254"


def _attribute(name: str) -> str | None:
    """Return an attribute of this VM, or None if the VM has no such attribute; raise OSError without an answer."""
    tries = _TRIES if _is_google() else 1
    for attempt in range(1, tries + 1):
        try:
            with contextlib.closing(http.client.HTTPConnection(server(), timeout=TIMEOUT)) as connection:
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
            if attempt == tries:
                raise OSError(str(error)) from error
            time.sleep(TIMEOUT / 4)
    return None


def _is_google() -> bool:
    return "Google" in _product()


def _product() -> str:
    try:
        return PRODUCT.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
