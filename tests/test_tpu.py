"""libtpu is silent where there is no TPU, and is left alone where there is one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from weight_folders import CONFIG, write_folder

from gpt2_flax import tpu
from gpt2_flax.text.tokenizer import load_tokenizer

HAS_TPU = any(list(Path("/dev").glob(pattern)) for pattern in tpu.DEVICE_FILES)


@pytest.mark.skipif(HAS_TPU, reason="has a TPU")
def test_a_command_prints_nothing_of_a_tpu_that_is_not_there(corpus, tokenizer_folder, tmp_path):
    pytest.importorskip("libtpu")
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


@pytest.mark.parametrize("device", ["accel0", "vfio/0", None])
def test_a_tpu_that_is_there_is_not_described(tmp_path, monkeypatch, device):
    environment = {"TPU_WORKER_HOSTNAMES": "t0,t1"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(tpu, "Path", lambda path: tmp_path / path[1:])
    (tmp_path / "dev/vfio").mkdir(parents=True)
    if device:
        (tmp_path / "dev" / device).touch()
    tpu.silence_libtpu_without_tpu()
    assert environment["TPU_WORKER_HOSTNAMES"] == "t0,t1"
    assert (len(environment) > 1) == (device is None)
