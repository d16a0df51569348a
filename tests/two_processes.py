"""A run of two real processes on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from gpt2_flax.config import dump_config

ROOT = Path(__file__).parent.parent
RUN = "import runpy; runpy.run_module('gpt2_flax', run_name='__main__', alter_sys=True)"


def start(config, tmp_path, *more, of_1=(), devices_of_1=1, before=("", ""), folders=(ROOT, ROOT)):
    """Starts both; `before` is Python that each executes first, and `folders` are those that each works in."""
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = ["train", path, "--coordinator", coordinator, "--num-processes", "2", *more]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", f"{before[number]}\n{RUN}", *command, "--process-id", str(number), *own],
            cwd=folders[number],
            env=environment | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number, (own, devices) in enumerate([((), 1), (of_1, devices_of_1)])
    ]


def ended(processes):
    """Waits for both; returns exit codes, standard outputs and standard errors."""
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*outputs, strict=True)
