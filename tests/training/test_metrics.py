"""The numbers and texts by which a person judges a run."""

import importlib.util
import json
import math
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support.configs import changed
from support.one_device import step_and_state
from tensorboardX.proto.event_pb2 import Event

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import IGNORE, Batch, RowLayout
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.inference.generate import Generator, Sampling
from gpt2_flax.model.flops import flops_per_token
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.parallel import devices as parallel_devices
from gpt2_flax.parallel.devices import peak_flops, peak_memory
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.parallel.rules import tree_shardings
from gpt2_flax.training import loop, throughput
from gpt2_flax.training.metrics import MetricsLog
from gpt2_flax.training.samples import sampler
from gpt2_flax.training.step import make_train_step

PROMPTS = ["这是很久", "", "大鸟飞过山河"]


def records(config):
    return [json.loads(line) for line in RunFolder(config.output).metrics.read_text().splitlines()]


def events(config):
    """The newest value of each TensorBoard tag: the length, its sum, the event, and a sum again for each record."""
    found = {}
    for path in RunFolder(config.output).tensorboard.iterdir():
        content = path.read_bytes()
        while content:
            size = struct.unpack("<Q", content[:8])[0]
            for value in Event.FromString(content[12 : 12 + size]).summary.value:
                found[value.tag.removesuffix("/text_summary")] = value
            content = content[16 + size :]
    return found


@pytest.fixture(scope="module")
def trained(dataset_folder, tmp_path_factory):
    """A finished run with prompts, and what it printed."""
    import contextlib
    import io

    from gpt2_flax.config.parse import parse_config

    values = {
        "output": str(tmp_path_factory.mktemp("run") / "run"),
        "model": {"n_positions": 32, "n_layer": 2, "n_head": 8, "n_embd": 32, "dtype": "float32"}
        | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        "data": {"dataset": str(dataset_folder), "seq_length": 16, "global_batch_size": 16},
        "optimizer": {"learning_rate": 1e-2, "warmup": 2},
        "training": {"total_steps": 6, "log_every": 2, "evaluate_every": 3, "prompts": PROMPTS, "sample_tokens": 9},
        "mesh": {"fsdp": 2, "tensor": 2},
    }
    config = parse_config(values, "test")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(parallel_devices, "KINDS", (parallel_devices.Kind("cpu", 2, 1e-6, 1, 1),))
        loop.train(config)
    return config, printed.getvalue()


def test_flops_per_token_are_those_of_the_matrix_products():
    cfg = ModelConfig(vocab_size=50, n_positions=8, n_layer=3, n_head=2, n_embd=4)
    forward = 3 * (4 * 12 + 4 * 4 + 4 * 16 + 16 * 4) + 50 * 4  # multiplications with parameters
    attention = 3 * (4 * 7 + 7 * 4)  # scores and sums over 7 positions
    assert flops_per_token(cfg, 7) == 3 * 2 * (forward + attention)

    # Equation 3 of Megatron-LM (arXiv:2104.04473) for its GPT-3 of 175 billion, less what it computes again.
    layers, width, vocabulary, length = 96, 12288, 51200, 2048
    gpt3 = ModelConfig(vocab_size=vocabulary, n_positions=length, n_layer=layers, n_head=96, n_embd=width)
    megatron = 72 * layers * width**2 * (1 + length / (6 * width) + vocabulary / (12 * layers * width))
    assert flops_per_token(gpt3, length) == pytest.approx(megatron, rel=1e-12)


def test_flops_per_token_are_what_the_compiler_counts():
    cfg = ModelConfig(vocab_size=256, n_positions=64, n_layer=2, n_head=4, n_embd=128, dtype="float32")
    model = jax.eval_shape(lambda: GPT2(cfg, rngs=nnx.Rngs(0)))
    tokens_BT = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    compiled = jax.jit(lambda model, tokens_BT: model(tokens_BT)).lower(model, tokens_BT).compile()
    assert flops_per_token(cfg, 64) * 128 / 3 == pytest.approx(compiled.cost_analysis()["flops"], rel=0.05)


@pytest.mark.parametrize(
    ("kind", "in_bfloat16", "in_float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 494e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989e12, 494e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA L40S", 362e12, 183e12),
        ("TPU v4", 275e12, 275e12),
        ("TPU v5 lite", 197e12, 197e12),
        ("TPU v5", 459e12, 459e12),
        ("TPU v6 lite", 918e12, 918e12),
        ("cpu", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("TPU v99", None, None),
    ],
)
def test_peaks_are_known_or_left_out(kind, in_bfloat16, in_float32):
    assert (peak_flops(kind, "bfloat16"), peak_flops(kind, "float32")) == (in_bfloat16, in_float32)


def test_device_memory_is_that_of_the_fullest_device_or_left_out():
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    assert peak_memory([Device({"peak_bytes_in_use": 5}), Device({"peak_bytes_in_use": 9}), Device({})]) == 9
    assert peak_memory([Device(None)]) is None


@pytest.mark.slow
def test_the_numbers_of_a_step_fit_together(trained):
    config, printed = trained
    line = next(record for record in records(config) if record["step"] == 4)
    split = Mixture(config.data.datasets).datasets[config.data.dataset].train
    assert line["train/perplexity"] == pytest.approx(math.exp(line["train/loss"]))
    bits = line["train/loss"] / math.log(2) * (split.n_tokens - split.n_documents) / split.n_characters
    assert line["train/bits_per_character"] == pytest.approx(bits)
    assert line["train/samples"] == 4 * 16
    assert line["train/epoch"] == pytest.approx(4 * 16 / math.ceil((split.n_tokens - 1) / 16))
    assert line["train/skipped_steps"] == 0
    assert line["train/data_wait_s"] >= 0
    assert 0.5 < line["train/target_share"] < 1
    assert line["train/real_tokens_per_second"] == pytest.approx(line["train/tokens_per_second"], rel=0.05)
    flops = flops_per_token(load_source(RunFolder(config.output).path).model, 16)
    assert line["train/mfu"] == pytest.approx(flops * line["train/tokens_per_second"] / (8 * 1e6))
    assert f"MFU {line['train/mfu']:.1%}" in printed
    assert "train/device_memory_peak_bytes" not in line  # the CPU does not say


@pytest.mark.slow
def test_padding_and_positions_without_target_are_counted(config):
    step, start, batches = step_and_state(config, 1)
    tokens_BT, targets_BT, segments_BT, positions_BT = map(jnp.array, batches[0])
    halved = Batch(tokens_BT, targets_BT.at[:, 4:].set(IGNORE), segments_BT.at[:, 8:].set(0), positions_BT)
    _, metrics = step(start(), halved)
    assert float(metrics.real) == 0.5
    assert float(metrics.targets) == (halved.targets_BT != IGNORE).mean() <= 0.25


@pytest.mark.slow
def test_every_number_is_in_tensorboard(trained):
    config, _ = trained
    newest = {}
    for record in records(config):
        newest |= record
    shown = events(config)
    assert shown.keys() == newest.keys() - {"step", "time", "checkpoint"} | {"samples"}
    assert all(shown[name].simple_value == pytest.approx(newest[name]) for name in shown.keys() - {"samples"})


EVENTS = """
import importlib.util, sys
from pathlib import Path
from gpt2_flax.training.tensorboard import TensorBoard
events = TensorBoard(Path(sys.argv[1]), print)
events.add_scalars(1, {"train/loss": 2.0})
events.add_text(1, "samples", "text")
events.close()
print("tensorboardX" in sys.modules, "torch" in sys.modules, importlib.util.find_spec("torch") is not None)
"""


@pytest.mark.multiprocess
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_run_does_not_wait_for_torch_and_can_import_it_later(tmp_path):
    done = subprocess.run([sys.executable, "-c", EVENTS, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "True False True\n"


@pytest.mark.slow
def test_prompts_are_continued_at_each_evaluation(trained):
    config, _ = trained
    lines = RunFolder(config.output).samples.read_text(encoding="utf-8").splitlines()
    assert [line[:14] for line in lines] == ["step       3  "] * 3 + ["step       6  "] * 3
    texts = [line[14:] for line in lines]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, PROMPTS * 2, strict=True))
    assert texts[:3] != texts[3:]
    assert events(config)["samples"].tensor.string_val[0].decode() == "\n\n".join(texts[3:])
    # What the finished model says, on one device, with the draws of the run.
    generator = Generator(load_source(RunFolder(config.output).path))
    assert texts[3:] == generator.texts(PROMPTS, 9, Sampling(top_k=50), 0)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"data": 1}, {"data": 8}, {"fsdp": 4, "tensor": 2}])
def test_samples_are_the_same_on_every_mesh(config, keys):
    vocab_size = Mixture(config.data.datasets).vocab_size
    config = changed(config, training__prompts=PROMPTS, training__sample_tokens=9, model__vocab_size=vocab_size)
    mesh = make_mesh(MeshSizes(**keys), jax.devices()[: math.prod(keys.values())])
    model = GPT2(config.model, rngs=nnx.Rngs(0))
    texts = sampler(config, Mixture(config.data.datasets))
    expected = texts(model)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(model, tree_shardings(model, mesh))
        assert texts(sharded) == expected
    assert len(set(expected)) == 3


def test_a_sample_is_one_line_whatever_it_holds(config):
    run = RunFolder(config.output)
    run.create()
    with MetricsLog(run) as log:
        log.write_texts(7, ["a\nb\x1b[2J", "这\u3000是"])
    assert run.samples.read_text(encoding="utf-8") == "step       7  a\\nb\\x1b[2J\nstep       7  这\u3000是\n"


@pytest.mark.slow
def test_a_prompt_without_room_for_a_token_is_refused_at_the_start(config):
    with pytest.raises(
        UserError, match=r"prompt of 3\d tokens leaves no room in 32 positions: training.prompts"
    ) as error:
        loop.train(changed(config, training__prompts=["这", "鸟" * 31]))
    assert error.value.exit_code == ExitCode.CONFIG
    assert not RunFolder(config.output).path.exists()


def test_epochs_and_characters_of_a_mixture(config, dataset_folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(dataset_folder)
    folders = {str(dataset_folder): 3, str(link): 1.0}
    config = changed(config, data__dataset=folders, model__vocab_size=100)
    mixture = Mixture(config.data.datasets)
    found = throughput.throughput(config, make_mesh(MeshSizes()), mixture, mixture.batches(RowLayout(16), 0))
    alone = Mixture({str(dataset_folder): 1.0})
    one = throughput.throughput(
        changed(config, data__dataset=str(dataset_folder)),
        make_mesh(MeshSizes()),
        alone,
        alone.batches(RowLayout(16), 0),
    )
    windows = one.samples_per_epoch[str(dataset_folder)]
    assert found.samples_per_epoch == {str(dataset_folder): pytest.approx(windows * 4 / 3), str(link): windows * 4}
    assert found.characters_per_target == pytest.approx(one.characters_per_target)


@pytest.mark.slow
def test_numbers_are_read_one_step_late_and_nothing_else_is(config, monkeypatch):
    """The devices never wait: a step is dispatched before the numbers of the one before are asked for."""
    happened = []
    get, make = jax.device_get, make_train_step

    def recorded_get(tree):
        happened.append("read")
        return get(tree)

    def recorded_make(*arguments):
        step = make(*arguments)

        def recorded(state, batch):
            happened.append("step")
            with jax.transfer_guard("disallow"):
                return step(state, batch)

        return recorded

    monkeypatch.setattr(jax, "device_get", recorded_get)
    monkeypatch.setattr(loop, "make_train_step", recorded_make)
    loop.train(changed(config, training__evaluate_every=100, training__save_every=100, training__total_steps=5))
    assert happened[:9] == ["step", *["step", "read"] * 4]
    assert "train/loss" in records(config)[0]
    assert "train/mfu" not in records(config)[0]  # nobody knows what this CPU could do
