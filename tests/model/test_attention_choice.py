from functools import partial

import pytest

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model import attention_choice as module
from gpt2_flax.model.attention_choice import choose_attention

NO_DROPOUT = (
    "model.attn_pdrop is 0.1, and splash attention has no dropout; "
    "plain products move 1.6 times as much memory in a layer"
)
CFG = ModelConfig(vocab_size=64, n_positions=2048, n_layer=2, n_head=2, n_embd=128, attn_pdrop=0.0)
auto = partial(choose_attention, length=1024, dropout=True, documents=True)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(module, "compute_capability", lambda: (9, 0))


@pytest.mark.parametrize(
    ("platform", "changes", "arguments", "expected"),
    [
        ("cpu", {}, {}, ("xla", "the fastest on a cpu")),
        ("gpu", {}, {}, ("flash", "the fastest on a gpu")),
        ("gpu", {}, {"documents": False}, ("cudnn", "the fastest on a gpu")),
        ("gpu", {"attn_pdrop": 0.1}, {"documents": False}, ("flash", "the fastest on a gpu")),
        ("gpu", {"n_embd": 24}, {"documents": False}, ("flash", "the fastest on a gpu")),
        ("gpu", {"attention": "flash"}, {"documents": False}, ("flash", "set by model.attention")),
        ("tpu", {}, {}, ("splash", "the fastest on a tpu")),
        ("gpu", {"attention": "xla"}, {}, ("xla", "set by model.attention")),
        ("gpu", {"attention": "cudnn"}, {}, ("cudnn", "set by model.attention")),
        ("tpu", {"attention": "splash"}, {}, ("splash", "set by model.attention")),
        ("tpu", {"dtype": "float32"}, {}, ("splash", "the fastest on a tpu")),
        ("gpu", {"attn_pdrop": 0.1}, {"dropout": False, "documents": False}, ("cudnn", "the fastest on a gpu")),
        ("tpu", {"attn_pdrop": 0.1}, {"dropout": False}, ("splash", "the fastest on a tpu")),
        ("gpu", {}, {"length": 1023, "documents": False}, ("cudnn", "the fastest on a gpu")),
        ("gpu", {"n_head": 1, "n_embd": 256}, {}, ("cudnn", "the fastest on a gpu")),
    ],
)
def test_choice(platform, changes, arguments, expected):
    assert auto(CFG.model_copy(update=changes), platform=platform, **arguments) == expected


REFUSALS = [
    (
        "cudnn",
        "cpu",
        {},
        {},
        "the device is a cpu, and cuDNN flash attention needs an NVIDIA GPU",
        "model.attention = auto",
    ),
    ("splash", "gpu", {}, {}, "the device is a gpu, and splash attention needs a TPU", "model.attention = auto"),
    (
        "cudnn",
        "gpu",
        {"attn_pdrop": 0.1},
        {},
        "model.attn_pdrop is 0.1, and cuDNN flash attention has no dropout",
        "model.attn_pdrop = 0",
    ),
    (
        "splash",
        "tpu",
        {"attn_pdrop": 0.1},
        {},
        NO_DROPOUT,
        "model.attn_pdrop = 0",
    ),
    (
        "cudnn",
        "gpu",
        {"dtype": "float32"},
        {},
        "model.dtype is float32, and cuDNN flash attention needs bfloat16",
        "model.dtype = bfloat16",
    ),
    (
        "cudnn",
        "gpu",
        {"n_embd": 24},
        {},
        "heads are 12 wide (n_embd / n_head), and cuDNN flash attention needs a multiple of 8 up to 256",
        "another model.n_head",
    ),
    (
        "cudnn",
        "gpu",
        {"n_embd": 528},
        {},
        "heads are 264 wide (n_embd / n_head), and cuDNN flash attention needs a multiple of 8 up to 256",
        "another model.n_head",
    ),
    (
        "cudnn",
        "gpu",
        {},
        {"length": 127},
        "rows have 127 tokens, and cuDNN flash attention needs an even number to mask documents",
        "an even data.seq_length",
    ),
    (
        "splash",
        "tpu",
        {},
        {"length": 192},
        "rows have 192 tokens, and splash attention needs a multiple of 128",
        "data.seq_length to a multiple of 128",
    ),
]


@pytest.mark.parametrize(("kernel", "platform", "changes", "arguments", "why", "fix"), REFUSALS)
def test_what_cannot_be_is_refused_when_asked_for_and_else_left(kernel, platform, changes, arguments, why, fix):
    with pytest.raises(UserError) as refusal:
        auto(CFG.model_copy(update={"attention": kernel, **changes}), platform=platform, **arguments)
    assert refusal.value.exit_code == ExitCode.CONFIG
    assert refusal.value.what == f"model.attention is {kernel} but {why}"
    assert refusal.value.fix == f"set {fix} or model.attention = xla"


@pytest.mark.parametrize(
    ("platform", "changes", "arguments", "why"),
    [
        ("gpu", {"dtype": "float32"}, {}, "model.dtype is float32, and the flash kernel needs bfloat16"),
        (
            "gpu",
            {"n_embd": 528},
            {},
            "heads are 264 wide (n_embd / n_head), and the flash kernel needs at most 128",
        ),
        (
            "tpu",
            {"attn_pdrop": 0.1},
            {},
            NO_DROPOUT,
        ),
        ("tpu", {}, {"length": 192}, "rows have 192 tokens, and splash attention needs a multiple of 128"),
    ],
)
def test_where_no_kernel_can_plain_products_do(platform, changes, arguments, why):
    assert auto(CFG.model_copy(update=changes), platform=platform, **arguments) == ("xla", why)


@pytest.mark.parametrize(
    ("capability", "size", "expected"),
    [
        ((7, 5), 64, "the GPU has compute capability 7.5, and cuDNN flash attention needs 8.0 or more"),
        ((), 64, "the device is a gpu, and cuDNN flash attention needs an NVIDIA GPU"),
        ((8, 9), 128, None),
        ((8, 9), 256, "multiple of 8 up to 128"),
        ((10, 0), 256, None),
        (None, 64, None),
        (None, 256, "multiple of 8 up to 128"),
    ],
)
def test_choice_by_the_kind_of_gpu(monkeypatch, capability, size, expected):
    monkeypatch.setattr(module, "compute_capability", lambda: capability)
    kernel, reason = auto(CFG.model_copy(update={"n_embd": 2 * size}), platform="gpu", documents=False)
    assert kernel == ("xla" if expected else "cudnn")
    assert expected is None or expected in reason


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 5), "the GPU has compute capability 7.5, and the flash kernel needs 8.0 or more"),
        ((), "the device is a gpu, and the flash kernel needs an NVIDIA GPU"),
        ((8, 0), None),
        ((12, 0), None),
        (None, None),
    ],
)
def test_flash_by_the_kind_of_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(module, "compute_capability", lambda: capability)
    choice = auto(CFG.model_copy(update={"attn_pdrop": 0.1}), platform="gpu")
    assert choice == (("xla", expected) if expected else ("flash", "the fastest on a gpu"))


def test_without_a_gpu_there_is_no_compute_capability(monkeypatch):
    monkeypatch.undo()
    assert module.compute_capability() is None


def test_without_the_backend_of_the_flash_kernel_others_are_taken(monkeypatch):
    monkeypatch.setattr(module, "TRITON", "jax.experimental.pallas.none_such")
    assert auto(CFG, platform="gpu") == ("cudnn", "the fastest on a gpu")
    kernel, why = auto(CFG.model_copy(update={"attn_pdrop": 0.1}), platform="gpu")
    assert kernel == "xla"
    assert why.endswith("has no Triton backend for Pallas, and the flash kernel needs one")
