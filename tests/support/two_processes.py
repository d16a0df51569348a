"""Start a run of two real processes on this machine."""

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

from gpt2_flax.config.parse import dump_config

ROOT = Path(__file__).parents[2]
RUN = "import runpy; runpy.run_module('gpt2_flax', run_name='__main__', alter_sys=True)"


def free_ports():
    """Return a port that is free together with the next port, below the ephemeral ports."""
    for port in random.SystemRandom().sample(range(10000, 30000, 2), 100):
        with contextlib.suppress(OSError), socket.create_server(("", port)), socket.create_server(("", port + 1)):
            return port
    raise AssertionError("no two free ports")


def start(config, tmp_path, *more, of_1=(), devices_of_1=1, before=("", ""), folders=(ROOT, ROOT)):
    """Start both processes; each executes its code in `before` first, in its folder of `folders`."""
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    command = ["train", path, "--coordinator", f"localhost:{free_ports()}", "--num-processes", "2", *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", f"{before[number]}\n{RUN}", *command, "--process-id", str(number), *own],
            cwd=folders[number],
            env=environment | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("_count=8", f"_count={devices}")},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number, (own, devices) in enumerate([((), 1), (of_1, devices_of_1)])
    ]


def ended(processes):
    """Wait for both processes; return exit codes, standard outputs and standard errors."""
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*outputs, strict=True)
