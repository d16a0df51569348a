"""Freed memory is used again without system calls, and several results take one pass over memory."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_flax.cpu import tune_cpu

PROGRAM = """
import resource, sys
import numpy as np
from gpt2_flax.cpu import tune_cpu

if sys.argv[1] == "keep":
    tune_cpu()
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 * 2**20, np.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""


def faults(how):
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent.parent).stdout)


@pytest.mark.multiprocess
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_pages_are_mapped_once():
    kept = faults("keep")
    assert kept < 20
    assert faults("leave") > kept  # pages have 4 KiB or 2 MiB


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    tune_cpu()


@pytest.mark.parametrize("before", ["", "--xla_force_host_platform_device_count=2"])
def test_flags_of_the_user_stay(before, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    tune_cpu()
    tune_cpu()
    expected = f"{before} --xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true".strip()
    assert os.environ["XLA_FLAGS"] == expected


def test_options_of_the_user_are_not_replaced(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_extra_options=xla_cpu_optimize_for_size")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    tune_cpu()
    assert os.environ["XLA_FLAGS"] == "--xla_backend_extra_options=xla_cpu_optimize_for_size"


ADAMW = """
from gpt2_flax.cpu import tune_cpu

tune_cpu()
import jax
import jax.numpy as jnp

from gpt2_flax.config.parse import parse_config
from gpt2_flax.training.optimizer import make_optimizer

values = {"output": "run", "optimizer": {"name": "adamw"}, "data": {"dataset": "d"}, "training": {"total_steps": 9}}
tx = make_optimizer(parse_config(values, "test"))
params = {"h/mlp/c_fc/kernel": jnp.ones((64, 64, 64))}


def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(jnp.add, params, updates), state


program = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params).compile().as_text()
entry = program[program.index("ENTRY") :]
print(sum("= (f32[64,64,64]" in line and " fusion(" in line for line in entry.splitlines()))
print(sum("= f32[64,64,64]" in line and " fusion(" in line for line in entry.splitlines()))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_adamw_is_one_pass():
    command = [sys.executable, "-c", ADAMW]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as in training
    where = Path(__file__).parent.parent
    done = subprocess.run(command, check=True, capture_output=True, env=environment, cwd=where)
    assert done.stdout.split() == [b"1", b"0"]
