"""What the processes of a run compare before they train: a difference would hang the run or spoil its numbers."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config.parse import config_values
from gpt2_flax.config.schema import Config
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import quote
from gpt2_flax.processes.watchdog import Watchdog

_DATA = {
    "tokenizer": "tokenizer_fingerprint",
    "training tokens": "tokens_fingerprint",
    "validation tokens": "validation_fingerprint",
}
_SAME_BACKEND = 60.0  # seconds; JAX makes processes with the same kind of device wait for each other


def agree_on_start(
    stages: Sequence[Config],
    mixtures: Sequence[Mixture],
    allow_change: Sequence[str],
    time_limit: bool,
    watchdog: Watchdog,
) -> None:
    """Compare configs, data and devices of all processes; raise `UserError` (CONFIG) that names a difference.

    Call this before anything else asks JAX for devices.
    """
    changes = " ".join(sorted(set(allow_change))) or "nothing"
    how = {"--allow-change": changes, "--max-hours": "a number" if time_limit else "nothing"}
    watchdog.agree({"the number of stages": str(len(stages)), **how})
    for number, (config, mixture) in enumerate(zip(stages, mixtures, strict=True), 1):
        watchdog.agree(config_facts(config, mixture, f"stages.{number}." if len(stages) > 1 else ""))
    kinds = sorted({device.device_kind for device in jax.local_devices()})
    count = str(jax.local_device_count())
    devices = {"the kind of local devices": ", ".join(kinds), "the number of local devices": count}
    watchdog.agree(devices, _SAME_BACKEND)


def config_facts(config: Config, mixture: Mixture, prefix: str = "") -> dict[str, str]:
    """Return the value of each dotted key; datasets are represented by their fingerprints, not by their folders."""
    facts = {prefix + key: _shown(value) for key, value in config_values(config).items() if key != "data.dataset"}
    sums = mixture.fingerprints()
    return facts | {f"{prefix}data.dataset ({what})": f"sha256 {sums[name][:16]}" for what, name in _DATA.items()}


def agree_on_weights(weights: Mapping[str, np.ndarray], watchdog: Watchdog) -> None:
    """Compare the weights that each process read from `init_from`; raise as `agree_on_start`."""
    if jax.process_count() > 1:
        digest = hashlib.sha256()
        for path, array in sorted(weights.items()):
            digest.update(f"{path} {array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        watchdog.agree({"the weights of init_from (sha256)": digest.hexdigest()[:16]})


def check_shared(run: RunFolder, watchdog: Watchdog) -> None:
    """Check that all processes see one run folder.

    Raises:
        UserError: CONFIG when a process does not see the folder of process 0; CANT_CREATE when the folder is in use.
    """
    if not watchdog.token:
        return
    with run.showing(watchdog.token) if watchdog.number == 0 else contextlib.nullcontext():
        watchdog.agree({})  # the sign of process 0 is there
        if watchdog.number != 0:
            run.check_shows(watchdog.token)
        watchdog.agree({})  # all processes have seen the sign


def _shown(value: Any) -> str:
    """Return a value for an error; a long value is cut and gets a sha256."""
    shown, whole = quote(value), ascii(value)
    return shown if shown == whole else f"{shown} (sha256 {hashlib.sha256(whole.encode()).hexdigest()[:16]})"
