"""Two real processes on this machine, joined into one program."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from conftest import changed

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config import dump_config
from gpt2_flax.errors import ExitCode
from gpt2_flax.training import loop

ROOT = Path(__file__).parent.parent


def start(config, tmp_path, *more):
    """Starts the two processes of a run."""
    path = tmp_path / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "gpt2_flax", "train", path, "--coordinator", coordinator, "--num-processes", "2"]
    command += more
    return [
        subprocess.Popen(
            [*command, "--process-id", str(number)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]


def ended(processes):
    """Waits for both; returns exit codes, standard outputs and standard errors."""
    try:
        outputs = [process.communicate(timeout=180) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*outputs, strict=True)


def logged(config):
    lines = [json.loads(line) for line in RunFolder(config.output).metrics.read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_two_processes_stop_together_go_on_and_give_the_losses_of_one(config, tmp_path):
    seldom = {"training__evaluate_every": 1000, "training__save_every": 1000}
    same_rate = {"optimizer__schedule": "constant", "optimizer__learning_rate": 1e-3}  # whatever total_steps is
    prompts = {"training__prompts": ["这是", "大鸟", ""]}
    config = changed(config, output=str(tmp_path / "two"), model__resid_pdrop=0.1, **seldom, **same_rate, **prompts)
    processes = start(changed(config, training__total_steps=2000), tmp_path)
    metrics, patience = RunFolder(config.output).metrics, time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and processes[0].poll() is None:
        assert time.monotonic() < patience
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    codes, _, errors = ended(processes)
    assert codes == [ExitCode.TRY_AGAIN] * 2, errors
    step = max(logged(config))
    for error in errors:
        assert f"error: stopped at step {step}, saved" in error

    config = changed(config, training__total_steps=step + 3)
    codes, outputs, errors = ended(start(config, tmp_path, "--allow-change", "training.total_steps"))
    assert codes == [0, 0], errors
    assert f"resumed from step {step}" in outputs[0]
    assert "step" not in outputs[1]  # one process speaks for all
    samples = RunFolder(config.output).samples.read_text(encoding="utf-8").splitlines()
    assert [line.split()[1] for line in samples] == [str(step + 3)] * 3

    alone = changed(config, output=str(tmp_path / "one"))
    loop.train(alone)
    two, one = logged(config), logged(alone)
    assert sorted(two) == sorted(one) == list(range(1, step + 4))
    np.testing.assert_allclose([two[step] for step in one], list(one.values()), rtol=1e-5)
