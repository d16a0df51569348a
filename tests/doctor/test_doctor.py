"""`gpt2-flax doctor`: a sentence for each fault, numbers against references, and checks that fail alone."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_flax import __main__ as cli
from gpt2_flax import nvidia
from gpt2_flax.doctor import attention, backend, examination, machine, rates, training
from gpt2_flax.doctor.attention import Case
from gpt2_flax.doctor.backend import Hardware, why_unseen
from gpt2_flax.doctor.examination import Check, examine, run_check
from gpt2_flax.doctor.report import Report
from gpt2_flax.model import attention as kernels
from gpt2_flax.nvidia import Gpu, Process

ROOT = Path(__file__).parents[2]
GIB = 2**30


@pytest.fixture
def found():
    """Return a report and the list of its records."""
    records = []
    return Report(records.append, 600), records


# NVIDIA's driver.


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Return a function that puts an `nvidia-smi` on PATH, which prints a text for each kind of query."""

    def make(gpus="", apps="", capabilities="", code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(
            f"#!/bin/sh\ncase $1 in\n*compute_cap*) printf '{capabilities}';;\n*query-gpu*) printf '{gpus}';;\n"
            f"*query-compute-apps*) printf '{apps}';;\nesac\nexit {code}\n",
            encoding="utf-8",
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


H100 = (
    "0, GPU-aa, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 70000\\n"
    "1, GPU-bb, NVIDIA H100 80GB HBM3, 580.95.05, 81559, 3\\n"
)


@pytest.mark.multiprocess
def test_gpus_and_processes_are_read(nvidia_smi):
    nvidia_smi(
        H100, "4711, GPU-aa, 69000, python3, with a comma\\n12, GPU-bb, [N/A], [Not Found]\\n", "0, 9.0\\n1, 9.0\\n"
    )
    assert nvidia.gpus() == [
        Gpu(0, "GPU-aa", "NVIDIA H100 80GB HBM3", "580.95.05", 81559 * 2**20, 70000 * 2**20, 9.0),
        Gpu(1, "GPU-bb", "NVIDIA H100 80GB HBM3", "580.95.05", 81559 * 2**20, 3 * 2**20, 9.0),
    ]
    assert nvidia.processes() == [
        Process(4711, "GPU-aa", 69000 * 2**20, "python3, with a comma"),
        Process(12, "GPU-bb", None, "[Not Found]"),
    ]


@pytest.mark.multiprocess
def test_no_program_is_no_gpu_and_a_failing_one_says_why(nvidia_smi, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvidia, "WINDOWS_PROGRAM", str(tmp_path / "none"))
    assert nvidia.gpus() == nvidia.processes() == []
    nvidia_smi("No devices were found\\n")
    assert nvidia.gpus() == []
    nvidia_smi("Failed to initialize NVML: Driver/library version mismatch\\n", code=18)
    with pytest.raises(OSError, match=r"^Failed to initialize NVML: Driver/library version mismatch$"):
        nvidia.gpus()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n", "580.95.05"),
        ("something else\n", None),
    ],
)
def test_the_driver_is_known_without_nvidia_smi(monkeypatch, write, text, version):
    monkeypatch.setattr(nvidia, "DRIVER", write(text.encode()))
    assert nvidia.driver_version() == version


def test_device_files_are_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(nvidia, "DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()  # a driver without a GPU
    assert not nvidia.is_here()
    (tmp_path / "nvidia3").touch()
    assert nvidia.is_here()


GPUS = [Gpu(n, f"GPU-{n}x", "A", "580.1", 80 * GIB, 0, 9.0) for n in range(3)]


@pytest.mark.parametrize(
    ("setting", "indices"),
    [(None, [0, 1, 2]), ("2,0", [2, 0]), ("GPU-1x", [1]), ("GPU-1", [1]), ("1,7,0", [1]), ("", []), ("-1", [])],
)
def test_visible_gpus(setting, indices):
    assert [gpu.index for gpu in nvidia.visible(GPUS, setting)] == indices


@pytest.mark.parametrize(
    ("driver", "capability", "cuda"),
    [
        ("580.65.06", 9.0, 13),
        ("579.99", 9.0, 12),
        ("525.60.13", None, 12),
        ("524.9", None, None),
        ("590.1", 7.0, 12),  # a V100
        ("590.1", 7.5, 13),
        (None, None, 13),
    ],
)
def test_cuda_for_a_driver(driver, capability, cuda):
    assert nvidia.cuda_for(driver, capability) == cuda


# Faults of the installation and of the memory.

CUDA12 = {"jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}
CUDA13 = {"jaxlib": "0.10.2", "jax-cuda13-plugin": "0.10.2", "jax-cuda13-pjrt": "0.10.2"}


@pytest.mark.parametrize(
    ("installed", "driver", "capabilities", "sentences"),
    [
        (CUDA12, "525.60.13", [9.0], []),
        (CUDA13, "580.65.06", [9.0], []),
        (CUDA12, None, [], []),
        ({"jaxlib": "0.10.2"}, "390.1", [], []),
        (CUDA13, "535.104", [9.0], [r"driver 535\.104 is too old.*CUDA 13 needs 580.*gpt2_flax\[cuda12\]"]),
        (CUDA12, "470.1", [], [r"driver 470\.1 is too old.*CUDA 12 needs 525 or newer: update the driver$"]),
        (CUDA13, "580.1", [7.0], [r"compute capability 7\.0, and CUDA 13.*needs 7\.5.*gpt2_flax\[cuda12\]"]),
        (CUDA12 | CUDA13, "580.1", [9.0], [r"both installed.*pip uninstall jax-cuda12-plugin jax-cuda12-pjrt"]),
        (
            CUDA12 | CUDA13,
            "550.1",
            [9.0],
            [r"both installed.*pip uninstall jax-cuda13-plugin jax-cuda13-pjrt", "driver 550.1 is too old"],
        ),
        (CUDA12 | {"jaxlib": "0.10.1"}, "580.1", [], [r"0\.10\.2 but jaxlib is 0\.10\.1.*'jax\[cuda12\]==0\.10\.1'"]),
        (CUDA13 | {"jax-cuda13-pjrt": "0.10.0"}, "580.1", [], [r"pip install 'jax-cuda13-pjrt==0\.10\.2'"]),
    ],
)
def test_packages_that_do_not_fit_together_are_named(installed, driver, capabilities, sentences):
    said = list(machine.wrong_packages(installed, driver, capabilities))
    assert len(said) == len(sentences)
    for sentence, pattern in zip(said, sentences, strict=True):
        assert re.search(pattern, sentence)


def test_other_processes_and_too_little_free_memory_are_named():
    gpus = [replace(GPUS[0], used=70 * GIB), replace(GPUS[1], used=GIB)]
    others = [Process(7, "GPU-0x", 69 * GIB, "python"), Process(8, "GPU-1x", None, "x"), Process(9, "GPU-2x", GIB, "y")]
    said = list(machine.wrong_memory(gpus, others, {}))
    assert said == [
        "process 7 (python) holds 69.0 GiB of GPU 0: end it, or choose other GPUs with CUDA_VISIBLE_DEVICES",
        "process 8 (x) holds memory of GPU 1: end it, or choose other GPUs with CUDA_VISIBLE_DEVICES",
        "GPU 0 has 10.0 GiB of 80.0 GiB free but JAX takes 60.0 GiB when it starts: "
        "end what uses it, or set XLA_PYTHON_CLIENT_MEM_FRACTION=0.11",
    ]


@pytest.mark.parametrize(
    ("environment", "enough"),
    [
        ({}, False),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".4"}, True),
        ({"XLA_CLIENT_MEM_FRACTION": "0.6"}, False),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, True),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, True),
    ],
)
def test_what_jax_takes_follows_its_settings(environment, enough):
    said = list(machine.wrong_memory([replace(GPUS[0], used=40 * GIB)], [], environment))
    assert (not said) == enough


@pytest.mark.multiprocess
def test_the_machine_is_described(found, nvidia_smi, monkeypatch, tmp_path):
    nvidia_smi(H100, "4711, GPU-aa, 69000, python3\\n", "0, 9.0\\n1, 9.0\\n")
    for index, (vendor, device) in enumerate([("0x1ae0", "0x0063"), ("0x1ae0", "0x0063"), ("0x1ae0", "0x0042")]):
        (tmp_path / f"pci/{index}").mkdir(parents=True)
        (tmp_path / f"pci/{index}/vendor").write_text(f"{vendor}\n", encoding="utf-8")
        (tmp_path / f"pci/{index}/device").write_text(f"{device}\n", encoding="utf-8")  # the last is a network card
    monkeypatch.setattr(machine, "PCI", tmp_path / "pci")
    monkeypatch.setattr(nvidia, "DRIVER", tmp_path / "none")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    report, records = found
    machine.machine(report)
    lines = [(record["name"], record["text"]) for record in records if "name" in record]
    assert ("jax", importlib.metadata.version("jax")) in lines
    assert ("driver", "580.95.05") in lines
    assert ("gpu 0", "NVIDIA H100 80GB HBM3, 68.4 GiB of 79.6 GiB in use") in lines
    assert ("tpu", "2 x TPU v5e") in lines
    assert ("environment", "NCCL_DEBUG=INFO") in lines
    wrong = [record["wrong"] for record in records if "wrong" in record]
    assert [sentence.partition(" ")[0] for sentence in wrong] == ["process", "GPU"]
    json.dumps(records, allow_nan=False)


@pytest.mark.multiprocess
def test_a_failing_driver_is_named_only_where_there_is_a_gpu(found, nvidia_smi, monkeypatch, tmp_path):
    nvidia_smi("NVIDIA-SMI has failed", code=9)
    monkeypatch.setattr(nvidia, "DEVICES", tmp_path / "dev")
    report, records = found
    machine.machine(report)
    assert not [record for record in records if "wrong" in record]
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    machine.machine(report)
    (record,) = [record for record in records if "wrong" in record]
    assert record["wrong"].startswith("nvidia-smi fails: NVIDIA-SMI has failed; ")


# Devices that JAX does not see.

GPU_HERE = Hardware(True, "580.1", [9.0], {})
TPU_HERE = Hardware(False, None, [], {"TPU v5e": 4})


@pytest.mark.parametrize(
    ("platform", "there", "installed", "environment", "errors", "pattern"),
    [
        ("gpu", GPU_HERE, CUDA13, {}, [], None),
        ("tpu", TPU_HERE, {"libtpu": "1"}, {}, [], None),
        ("cpu", Hardware(False, None, [], {}), CUDA13, {}, [], None),
        ("cpu", GPU_HERE, {}, {}, [], r"installed without CUDA: run pip install 'gpt2_flax\[cuda\]'"),
        ("cpu", GPU_HERE._replace(driver="550.1"), {}, {}, [], r"without CUDA: run pip install 'gpt2_flax\[cuda12\]'"),
        ("cpu", GPU_HERE._replace(driver="470.1"), {}, {}, [], r"without CUDA: update the driver to 580 or newer"),
        ("cpu", GPU_HERE, CUDA13, {"JAX_PLATFORMS": "cpu"}, [], "JAX_PLATFORMS is cpu: unset it"),
        ("cpu", GPU_HERE, CUDA13, {"CUDA_VISIBLE_DEVICES": ""}, [], "CUDA_VISIBLE_DEVICES is '' and hides it"),
        ("cpu", GPU_HERE, CUDA13, {}, ["no cuDNN"], r"jax-cuda13-plugin is installed.*not use it: no cuDNN; run pip"),
        ("none", GPU_HERE, CUDA13, {"JAX_PLATFORMS": "cuda"}, ["broken"], "not use it: broken"),
        ("none", Hardware(False, None, [], {}), {}, {"JAX_PLATFORMS": "cuda"}, [], "there is no such device: unset"),
        ("cpu", TPU_HERE, {}, {}, [], r"TPU v5e is here but JAX is installed without TPUs.*gpt2_flax\[tpu\]"),
        ("cpu", TPU_HERE, {"libtpu": "1"}, {"JAX_PLATFORMS": "cpu"}, [], "JAX_PLATFORMS is cpu: unset it"),
        ("cpu", TPU_HERE, {"libtpu": "1"}, {}, ["in use by 7"], "does not use it: in use by 7; end what else uses it"),
    ],
)
def test_why_an_accelerator_is_not_seen(platform, there, installed, environment, errors, pattern):
    said = why_unseen(platform, there, installed, environment, errors)
    assert said is None if pattern is None else re.search(pattern, said)


def test_versions_of_libraries_are_readable():
    assert backend.readable("CUDA", 12090) == "12.9"
    assert backend.readable("CUDA", 13000) == "13.0"
    assert backend.readable("cuDNN", 91002) == "9.10.2"
    assert backend.readable("cuBLAS", 120901) == "12.9.1"


# Numbers.


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_reference_is_that_of_torch(documents, rate):
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(1)
    arrays = [draw.normal(size=(2, 256, 2, 64)) for _ in range(4)]
    segments_BT = np.arange(256) // np.array([[61], [100]])
    seen_BTS = attention.visible(segments_BT if documents else None)
    kept_BHTS = draw.random((2, 2, 256, 256)) >= rate if rate else None
    q, k, v, d_out = (torch.tensor(array, requires_grad=True) for array in arrays)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / 8
    weights = torch.softmax(scores.masked_fill(~torch.tensor(seen_BTS.copy())[:, None], -torch.inf), -1)
    if rate:
        weights = weights * torch.tensor(kept_BHTS) / (1 - rate)
    out = torch.einsum("bhts,bshk->bthk", weights, v)
    expected = (out, *torch.autograd.grad(out, (q, k, v), d_out))
    for result, other in zip(attention.reference(*arrays, seen_BTS, kept_BHTS, rate), expected, strict=True):
        np.testing.assert_allclose(result, other.detach().numpy(), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_the_kernel_of_this_cpu_agrees_with_the_reference(documents, dropout):
    errors, dropped = attention.examine(Case("xla", documents, dropout), "float32")
    assert set(errors) == {"out", "dq", "dk", "dv"}
    assert max(errors.values()) < 1e-6
    assert (dropped is not None) == dropout
    assert dropped is None or 0.095 < dropped < 0.105


def test_the_mask_is_the_one_that_a_kernel_used():
    """The zeroed weights of a known mask are found at every position."""
    kept_BHTS = np.random.default_rng(2).random((2, 2, 256, 256)) > 0.1
    causal_TS = np.tril(np.ones((256, 256), bool))

    def attend(q_BTHK, k_BTHK, v_BTHK):
        weights_BHTS = (kept_BHTS & causal_TS) / np.arange(1, 257)[:, None]
        return jnp.einsum("bhts,bshk->bthk", weights_BHTS, v_BTHK)

    np.testing.assert_array_equal(attention.kept_weights(attend, "float32"), kept_BHTS & causal_TS)


@pytest.mark.slow
def test_a_kernel_that_computes_wrong_numbers_or_fails_is_named(found, monkeypatch):
    right = kernels.causal_attention

    def broken(kernel, qkv_BT3HK, segments_BT=None, rate=0.0, key=None):
        if segments_BT is None:
            raise RuntimeError("no such\ninstruction")
        return 1.001 * right(kernel, qkv_BT3HK, segments_BT, rate, key)

    monkeypatch.setattr(attention, "causal_attention", broken)
    report, records = found
    attention.attention(report)
    said = [record["wrong"] for record in records if "wrong" in record]
    assert [sentence[:40] for sentence in said] == ["attention kernel xla computes wrong numb"] * 2 + [
        "attention kernel xla fails: set model.at"
    ] * 2
    lines = {record["name"]: record for record in records if "name" in record}
    assert lines["xla"]["text"] == "fails: RuntimeError: no such instruction"
    assert lines["xla documents"]["errors"]["out"] == pytest.approx(1e-3, rel=0.01)
    assert lines["flash"]["runs"] is lines["cudnn"]["runs"] is lines["splash"]["runs"] is False


def test_gradients_alone_can_be_wrong(found, monkeypatch):
    right = kernels.causal_attention

    @jax.custom_vjp
    def half(v_BTHK):
        return v_BTHK

    half.defvjp(lambda v_BTHK: (v_BTHK, None), lambda kept, d_BTHK: (0.5 * d_BTHK,))

    def broken(kernel, qkv_BT3HK, *rest):
        q_BTHK, k_BTHK, v_BTHK = jnp.unstack(qkv_BT3HK, axis=2)
        return right(kernel, jnp.stack([q_BTHK, k_BTHK, half(v_BTHK)], 2), *rest)

    monkeypatch.setattr(attention, "causal_attention", broken)
    errors, _ = attention.examine(Case("xla", True, False), "float32")
    assert errors["dv"] == pytest.approx(0.5)
    assert max(errors[name] for name in ("out", "dq", "dk")) < 1e-6


@pytest.mark.slow
def test_collectives_of_eight_devices(found):
    report, records = found
    rates.collectives(report)
    assert [(record["name"], record["right"]) for record in records] == [
        ("all-reduce", True),
        ("all-gather", True),
        ("reduce-scatter", True),
    ]
    assert all(record["bytes_a_second"] > 0 for record in records)


@pytest.mark.parametrize("name", ["all-reduce", "all-gather", "reduce-scatter"])
def test_a_collective_that_is_wrong_on_a_device_is_found(found, monkeypatch, name):
    exchange, layout = rates.EXCHANGES[name]

    def broken(row_1M):
        return exchange(row_1M) + (jax.lax.axis_index("devices") == 3)

    monkeypatch.setattr(rates, "EXCHANGES", {name: (broken, layout)})
    report, records = found
    rates.collectives(report)
    assert records[0]["text"] == "wrong on 1 of 8 devices"
    assert name in records[1]["wrong"]


def test_a_slow_device_is_named(found, monkeypatch):
    monkeypatch.setattr(rates, "product_rate", lambda: 2.5e14)
    monkeypatch.setattr(rates, "memory_rate", lambda: 3e12)
    monkeypatch.setattr(rates, "peak_flops", lambda kind, dtype: 989e12)
    monkeypatch.setattr(rates, "bandwidth", lambda kind: 3.35e12)
    report, records = found
    rates.rates(report)
    assert records[0]["text"] == "250T FLOP/s, 25% of the data sheet's 989T FLOP/s"
    assert records[1]["wrong"].startswith("the float32 product rate is 25% of the data sheet's: ")
    assert records[2]["text"] == "3 TB/s, 90% of the data sheet's 3.35 TB/s"
    assert len(records) == 3


@pytest.mark.slow
def test_steps_that_differ_are_counted(found, monkeypatch):
    prepared, runs = training.prepared, []

    def drifting(config):
        step, state, batch = prepared(config)

        def other(state, batch):
            runs.append(None)
            state, metrics = step(state, batch)
            if len(runs) == 6:  # the last step of the second run
                model = jax.tree.map(jnp.array, state.model)
                model.wpe.embedding = model.wpe.embedding.at[0, :5].add(1.0)
                state = state._replace(model=model)
            return state, metrics

        return other, state, batch

    monkeypatch.setattr(training, "prepared", drifting)
    report, records = found
    training.determinism(report)
    assert records[0]["differ"] == 5
    assert records[0]["text"].startswith("5 of ")
    assert 6 < records[0]["loss"] < 6.5  # a fresh model of 512 tokens: ln 512 is 6.24
    assert "other bits" in records[1]["wrong"]


def test_on_a_gpu_the_deterministic_step_is_tried_too(found, monkeypatch):
    monkeypatch.setattr(training, "platform", lambda: "gpu")
    monkeypatch.setattr(training, "differences", lambda config: (7, 10, 6.2, 0))
    report, records = found
    training.determinism(report)
    assert [record.get("name") for record in records] == [
        "3 steps twice",
        "3 steps twice, training.deterministic",
        None,
    ]
    # Without training.deterministic, a GPU may give other bits.
    assert records[2]["wrong"] == "with training.deterministic the same steps end in other bits: report this"


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (
            {16: ("none", 500e3, 8 * GIB), 32: ("none", 540e3, 12 * GIB)},
            "32 rows of 128.*remat=none; about 264 rows fit",
        ),
        ({16: ("none", 500e3, 8 * GIB), 32: ("none", 505e3, 12 * GIB)}, r"32 rows.*\(no faster than 16\)"),
        ({16: ("none", 500e3, 8 * GIB), 32: ("selected", 450e3, 9 * GIB)}, "16 rows of 128.*model.remat=none;"),
        ({4: ("full", 100e3, None)}, "4 rows of 128.*model.remat=full; for larger batches"),
        ({}, "nothing tried fits"),
    ],
)
def test_suggestions_follow_from_the_measurements(measured, expected):
    assert re.search(expected, training.suggestion(measured, 78 * GIB))


def test_a_batch_that_does_not_fit_is_tried_with_remat_and_then_with_fewer_rows(found, monkeypatch):
    def seconds(config):
        rows, remat = config.data.global_batch_size, config.model.remat
        if (rows, remat) != (4, "full"):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.00GiB")
        return 0.5, 3.0

    monkeypatch.setattr(training, "step_seconds", seconds)
    monkeypatch.setattr(training, "platform", lambda: "gpu")
    monkeypatch.setattr(training, "product_rate", lambda: 1e15)
    report, records = found
    training.speed(report)
    names = [record["name"] for record in records]
    assert names == [
        *("16 x 1024", "16 x 1024, remat selected", "16 x 1024, remat full"),
        *("4 x 1024", "4 x 1024, remat selected", "4 x 1024, remat full", "suggestion"),
    ]
    assert records[0]["text"].startswith("does not fit: out of memory (9 GiB asked")
    assert records[-2]["tokens_a_second"] == 4 * 1024 / 0.5
    assert records[-1]["text"].startswith("4 rows of 1024 a device at a time with model.remat=full")


# Checks in their own processes.


def check(name, seconds=30.0):
    return Check(name, f"support.doctor_checks:{name}", seconds)


@pytest.mark.multiprocess
def test_a_check_returns_its_results():
    outcome = run_check(check("good"), 30)
    assert outcome.status == "done"
    assert outcome.found == [{"name": "answer", "text": "42 and \x1b[2J", "value": 42, "bad": None}]
    assert not outcome.wrong
    assert not outcome.skipped


@pytest.mark.multiprocess
def test_a_check_that_raises_crashes_or_hangs_keeps_its_results():
    raised, crashed = run_check(check("raising"), 30), run_check(check("crashing"), 30)
    start = time.monotonic()
    hung = run_check(check("hanging", 8), 30)
    assert time.monotonic() - start < 60
    assert [outcome.status for outcome in (raised, crashed, hung)] == ["failed", "failed", "out of time"]
    assert [outcome.found[0]["text"] for outcome in (raised, crashed, hung)] == ["it failed", "it crashed", "it hung"]
    assert raised.wrong == ["raising failed: UserError: this is broken: here; fix it"]
    assert "Traceback" in raised.log
    (sentence,) = crashed.wrong
    assert sentence.startswith("crashing failed: its process ended with SIGSEGV")
    assert "about to crash" in crashed.log
    (sentence,) = hung.wrong
    assert re.fullmatch(r"hanging hangs: no end after 8s at gpt2_flax/doctor/report\.py:\d+", sentence)
    assert "doctor_checks.py" in hung.log


@pytest.mark.multiprocess
def test_a_check_skips_what_it_has_no_time_for():
    outcome = run_check(check("slow"), 6)
    assert outcome.status == "done"
    assert not outcome.wrong
    assert 1 <= len(outcome.found) < 28
    assert len(outcome.found) + len(outcome.skipped) == 100
    cut = run_check(check("hanging"), 5)
    assert cut.status == "out of time"
    assert not cut.wrong
    assert cut.skipped == ["the rest of hanging, cut off after 5s: give more --seconds"]


@pytest.mark.multiprocess
def test_one_check_does_not_stop_the_others(monkeypatch):
    checks = [check("good"), check("crashing"), check("wrong"), check("good")._replace(name="again")]
    monkeypatch.setattr(examination, "CHECKS", checks)
    lines = []
    content = examine(60, lines.append)
    assert [one["status"] for one in content["parts"].values()] == ["done", "failed", "done", "done"]
    assert content["parts"]["again"]["found"][0]["value"] == 42
    assert content["wrong"][1] == "the moon is full: wait"
    text = "\n".join(lines)
    assert "\x1b" not in text
    assert text.count("  answer                    42 and ") == 2
    assert "  WRONG                     the moon is full: wait" in lines
    assert lines[-1].startswith("result                      2 things wrong, in ")


@pytest.mark.multiprocess
def test_without_jax_and_without_time_the_rest_is_skipped(monkeypatch):
    checks = [check("raising")._replace(name="jax"), check("good")]
    monkeypatch.setattr(examination, "CHECKS", checks)
    lines = []
    assert len(examine(60, lines.append)["wrong"]) == 1
    assert lines[-1].startswith("result                      1 thing wrong, 1 skipped, in ")
    assert "  skipped                   good: JAX does not start" in lines
    monkeypatch.setattr(examination, "CHECKS", [check("good")])
    lines.clear()
    examine(1, lines.append)
    assert lines == [
        "good                        skipped",
        "  skipped                   good: no time left",
        "result                      nothing wrong, 1 skipped, in 0s",
    ]


def test_every_check_can_be_found():
    import importlib

    for each in examination.CHECKS:
        module, _, function = each.code.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    assert asdict(examination.Outcome())["status"] == "skipped"


# The command.


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more


@pytest.mark.multiprocess
def test_the_whole_command_on_a_cpu():
    command = [sys.executable, "-m", "gpt2_flax", "doctor", "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, encoding="utf-8", timeout=250)
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(done.stdout)
    assert list(content["parts"]) == [each.name for each in examination.CHECKS]
    assert {one["status"] for one in content["parts"].values()} == {"done"}
    found = {name: {line["name"]: line for line in one["found"]} for name, one in content["parts"].items()}
    assert found["machine"]["jaxlib"]["text"] == importlib.metadata.version("jaxlib")
    assert found["jax"]["platform"]["text"] == "cpu"
    assert found["rates"]["float32 product"]["measured"] > 1e9
    assert max(found["attention"]["xla documents dropout"]["errors"].values()) < 1e-6
    assert found["determinism"]["3 steps twice"]["differ"] == 0
    assert found["training"]["4 x 128"]["tokens_a_second"] > 100
    assert content["wrong"] == []


@pytest.mark.multiprocess
def test_a_gpu_that_jax_does_not_see_is_exit_code_69(nvidia_smi, monkeypatch, capsys):
    nvidia_smi(H100, "", "0, 9.0\\n1, 9.0\\n")
    monkeypatch.setattr(examination, "CHECKS", examination.CHECKS[:2])
    assert cli.exit_code(["doctor"]) == 69
    out, err = capsys.readouterr()
    assert "GPU 0 has 11.3 GiB of 79.6 GiB free but JAX takes 59.7 GiB" in out
    assert "WRONG                     an NVIDIA GPU is here but JAX" in out
    error = r"error: \d things wrong with this machine or what is installed: gpt2-flax doctor; see the l"
    assert re.fullmatch(error + r"ines that begin with WRONG\n", err)
    assert cli.exit_code(["doctor", "--json"]) == 69
    out, err = capsys.readouterr()
    assert "an NVIDIA GPU is here but JAX" in " ".join(json.loads(out)["wrong"])
    assert re.fullmatch(error + r'ist "wrong" in the JSON\n', err)


@pytest.mark.multiprocess
def test_ctrl_c_ends_the_check_under_way(tmp_path):
    command = [sys.executable, "-m", "gpt2_flax", "doctor"]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while not process.stdout.readline().startswith("jax "):
            pass
        time.sleep(0.5)  # the next check is running
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
        process.send_signal(2)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("error: interrupted: gpt2-flax doctor")
    assert children
    patience = time.monotonic() + 10
    while any(is_running(child) for child in children) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not any(is_running(child) for child in children)


def is_running(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""  # a zombie has none
    except FileNotFoundError:
        return False
