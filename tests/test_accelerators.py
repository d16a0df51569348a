"""Software for TPUs and GPUs is silent on machines without them, and unchanged on machines with them."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.weight_folders import CONFIG, write_folder

from gpt2_flax import accelerators
from gpt2_flax.tokenizers.tokenizer import load_tokenizer

FILES = accelerators.TPU_FILES + accelerators.GPU_FILES
HERE = any(any(Path("/dev").glob(pattern)) for pattern in FILES) or accelerators.nvidia_on_the_bus()


@pytest.mark.multiprocess
@pytest.mark.skipif(HERE, reason="has an accelerator")
@pytest.mark.parametrize("software", ["libtpu", "jax_plugins.xla_cuda12"])
def test_a_command_prints_nothing_of_accelerators_that_are_not_there(software, corpus, tokenizer_folder, tmp_path):
    pytest.importorskip(software)
    tokenizer = load_tokenizer(tokenizer_folder)
    config = CONFIG.model_copy(update={"vocab_size": tokenizer.vocab_size})
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    model = write_folder(tmp_path / "model", config, **ids)
    shutil.copytree(tokenizer_folder, model, dirs_exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_PLAT", "TPU_"))}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "gpt2_flax", "evaluate", model, "--data", corpus]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "loss" in done.stdout
    assert done.stderr == ""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that runs `silence_what_is_not_here` with these files, and returns the environment."""

    def machine(*files: str, plugin: str | None = "jax_cuda12_plugin", **environment: str) -> dict[str, str]:
        for file in files:
            path, _, content = file.partition("=")
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(content + "\n", encoding="utf-8")
        monkeypatch.setattr(os, "environ", environment)
        monkeypatch.setattr(accelerators, "Path", lambda path: tmp_path / path[1:])
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name == plugin else None)
        accelerators.silence_what_is_not_here()
        return environment

    return machine


@pytest.mark.parametrize("device", ["accel0", "vfio/0", None])
def test_a_tpu_that_is_there_is_not_described(machine, device):
    environment = machine(*[f"dev/{device}"] * bool(device), TPU_WORKER_HOSTNAMES="t0,t1")
    assert environment["TPU_WORKER_HOSTNAMES"] == "t0,t1"
    assert ("ALLOW_MULTIPLE_LIBTPU_LOAD" in environment) == (device is None)


BUS = "sys/bus/pci/devices/0000:01:00.0"


@pytest.mark.parametrize("plugin", ["jax_cuda12_plugin", "jax_cuda13_plugin"])
@pytest.mark.parametrize("files", [(), (f"{BUS}/vendor=0x10de", f"{BUS}/class=0x0c0330"), (f"{BUS}/vendor=0x1234",)])
def test_without_an_accelerator_jax_keeps_to_the_cpu(machine, plugin, files):
    assert machine(*files, plugin=plugin)["JAX_PLATFORMS"] == "cpu"


@pytest.mark.parametrize(
    "files",
    [
        ("dev/nvidia0",),
        ("dev/dxg",),
        ("dev/accel0",),
        (f"{BUS}/vendor=0x10de", f"{BUS}/class=0x030200"),  # its driver is not loaded, and JAX reports that
    ],
)
def test_an_accelerator_that_is_there_is_left_to_jax(machine, files):
    assert "JAX_PLATFORMS" not in machine(*files)


def test_what_the_user_set_or_did_not_install_stays_so(machine):
    assert machine(JAX_PLATFORMS="cuda,cpu")["JAX_PLATFORMS"] == "cuda,cpu"
    assert "JAX_PLATFORMS" not in machine(plugin=None)
