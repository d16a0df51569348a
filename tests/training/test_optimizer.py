"""Learning rates, AdamW as published with UER-py, Muon: each against a reference that is written out here."""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.configs import changed

from gpt2_flax.checkpoint.huggingface import to_state_dict
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.checkpoint.weights import weights_of
from gpt2_flax.config.file import load_config
from gpt2_flax.config.parse import dump_config, parse_config
from gpt2_flax.data.packing import Batch
from gpt2_flax.parallel import rules
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.training.optimizer import POLAR_EXPRESS, learning_rate, make_optimizer
from gpt2_flax.training.step import initial_state, make_train_step, state_layout

KERNELS = ["h/attn/c_attn/kernel", "h/attn/c_proj/kernel", "h/mlp/c_fc/kernel", "h/mlp/c_proj/kernel"]


def run_config(total_steps=30, **optimizer):
    """A run of a tiny model in float32 with AdamW, unless `optimizer`, keys of that section, says something else."""
    values = {
        "output": "run",
        "model": {"vocab_size": 100, "n_positions": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, "dtype": "float32"},
        "data": {"dataset": "dataset", "seq_length": 16, "global_batch_size": 8},
        "optimizer": {"learning_rate": 1e-3} | ({} if "preset" in optimizer else {"name": "adamw"}) | optimizer,
        "training": {"total_steps": total_steps},
    }
    return parse_config(values, "test").with_vocab_size(values["model"]["vocab_size"])


def batches(config):
    """Batches of rows that count up from random numbers, with an error now and then."""
    draw = np.random.default_rng(0)
    shape = (config.data.global_batch_size, config.data.seq_length + 1)
    for _ in range(config.training.total_steps):
        tokens_BS = (draw.integers(0, 100, (shape[0], 1)) + np.arange(shape[1])) % 100
        tokens_BS = np.where(draw.random(shape) < 0.1, draw.integers(0, 100, shape), tokens_BS).astype(np.int32)
        positions_BT = np.broadcast_to(np.arange(shape[1] - 1, dtype=np.int32), tokens_BS[:, 1:].shape)
        yield Batch(tokens_BS[:, :-1], tokens_BS[:, 1:], np.ones_like(positions_BT), positions_BT)


def on_devices(batch, mesh):
    return Batch(*jax.device_put(tuple(batch), rules.batch_sharding(mesh)))


class Run(NamedTuple):
    state: object
    losses: list
    rates: list
    first: dict
    weights: dict


def trained(config, steps=None, shape=(1, 1, 1)):
    """Trains on a mesh of `shape`; `first` are the weights after the first step."""
    mesh = make_mesh(
        MeshSizes(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True))), jax.devices()[: math.prod(shape)]
    )
    with jax.set_mesh(mesh):
        layout = state_layout(config, mesh)
        state, step = initial_state(config, layout), make_train_step(config, layout, mesh)
        found, first = [], None
        for batch in itertools.islice(batches(config), steps):
            state, metrics = step(state, on_devices(batch, mesh))
            found.append(metrics)
            first = first or weights_of(state.model)
    return Run(
        state, [float(m.loss) for m in found], [float(m.learning_rate) for m in found], first, weights_of(state.model)
    )


def start_weights(config):
    return weights_of(initial_state(config, state_layout(config, make_mesh(MeshSizes(), jax.devices()[:1]))).model)


# Schedules


def expected_rates(schedule, warmup, decay, total, lowest):
    """The share of the highest learning rate at each step, in float64."""
    step = np.arange(total, dtype=np.float64)
    done = (step - warmup) / (total - warmup)
    after = {
        "linear": 1 - (1 - lowest) * done,
        "cosine": lowest + (1 - lowest) * (1 + np.cos(np.pi * done)) / 2,
        "constant": np.ones(total),
        "wsd": 1 - (1 - lowest) * np.maximum(0, step - (total - decay)) / decay,
        "inverse_sqrt": np.sqrt(warmup / np.maximum(step, 1)),
    }[schedule]
    return np.where(step < warmup, step / max(warmup, 1), after)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "lowest", "decay", "decay_steps"),
    [
        *(("linear", lowest, 0.2, 40) for lowest in (0.0, 0.1, 1.0)),
        *(("cosine", lowest, 0.2, 40) for lowest in (0.0, 0.1)),
        *(("wsd", lowest, decay, steps) for lowest in (0.0, 0.1) for decay, steps in ((0.2, 40), (1, 1), (180, 180))),
        ("constant", 0.0, 0.2, 40),
        ("inverse_sqrt", 0.0, 0.2, 40),
    ],
)
def test_every_learning_rate_of_a_run_equals_float64(schedule, lowest, decay, decay_steps):
    for warmup, steps in ((1, 1), (20, 20), (0.1, 20), (0, 0))[: 3 if schedule == "inverse_sqrt" else 4]:
        keys = {"schedule": schedule, "min_learning_rate_ratio": lowest, "warmup": warmup, "decay": decay}
        rate = learning_rate(run_config(200, learning_rate=0.5, **keys))
        found = jax.jit(jax.vmap(lambda step, rate=rate: rate(step) + jnp.zeros(())))(jnp.arange(200))
        expected = 0.5 * expected_rates(schedule, steps, decay_steps, 200, lowest)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7, err_msg=f"warm-up {warmup}")


@pytest.mark.slow
def test_the_learning_rate_counts_optimizer_steps_whatever_the_accumulation():
    config = run_config(8, schedule="wsd", warmup=3, decay=4, learning_rate=1e-2)
    whole = trained(config)
    parts = trained(changed(config, training__accumulation_steps=4))
    np.testing.assert_allclose(whole.rates, 1e-2 * expected_rates("wsd", 3, 4, 8, 0.0), rtol=1e-6)
    assert parts.rates == whole.rates
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-5)


# AdamW of optax


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_thirty_updates_equal_the_adamw_of_optax(clip, decay_embeddings):
    config = run_config(max_grad_norm=clip, decay_embeddings=decay_embeddings, weight_decay=0.1, eps=1e-8)
    draw = np.random.default_rng(0)
    shapes = {"wte": {"embedding": (9, 4)}, "ln_f": {"scale": (4,)}, "h": {"mlp": {"kernel": (4, 6), "bias": (6,)}}}

    def tree(scale):
        return jax.tree.map(
            lambda shape: jnp.asarray(scale * draw.normal(size=shape), jnp.float32),
            shapes,
            is_leaf=lambda shape: isinstance(shape, tuple),
        )

    is_decayed = {
        "wte": {"embedding": decay_embeddings},
        "ln_f": {"scale": False},
        "h": {"mlp": {"kernel": True, "bias": False}},
    }
    keys = {"b1": config.optimizer.b1, "b2": config.optimizer.b2, "eps": 1e-8, "weight_decay": 0.1, "mask": is_decayed}
    theirs = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(), optax.adamw(learning_rate(config), **keys)
    )
    optimizers, params = (make_optimizer(config), theirs), [tree(1.0)] * 2
    states = [optimizer.init(params[0]) for optimizer in optimizers]
    for scale in np.geomspace(1e-3, 10, 30):
        grads = tree(scale)  # some are clipped, and some are not
        for index, optimizer in enumerate(optimizers):
            updates, states[index] = jax.jit(optimizer.update)(grads, states[index], params[index])
            params[index] = optax.apply_updates(params[index], updates)
        jax.tree.map(lambda ours, other: np.testing.assert_allclose(ours, other, rtol=1e-6, atol=1e-6), *params)
        moments = [optax.tree.get_all_with_path(state, "mu")[0][1] for state in states]
        jax.tree.map(lambda ours, other: np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-7), *moments)


# The recipe of UER-py


def test_a_preset_gives_what_is_left_out_and_nothing_else(tmp_path):
    plain, uer, mixed = (run_config(**keys).optimizer for keys in ({}, {"preset": "uer"}, {"preset": "uer", "b2": 0.9}))
    assert run_config(preset="default", name="adamw") == run_config()
    assert (plain.name, plain.b2, plain.decay_embeddings, plain.max_grad_norm) == ("adamw", 0.95, False, 1.0)
    assert (uer.b1, uer.b2, uer.eps, uer.weight_decay, uer.max_grad_norm) == (0.9, 0.999, 1e-6, 0.01, 0.0)
    assert (uer.name, uer.schedule, uer.warmup, uer.decay_embeddings) == ("adamw_uer", "linear", 0.1, True)
    assert mixed == uer.model_copy(update={"b2": 0.9})
    path = tmp_path / "config.toml"
    for config in (run_config(preset="uer"), run_config(preset="uer", max_grad_norm=2.0, warmup=7)):
        path.write_text(dump_config(config))
        assert load_config(path).with_vocab_size(config.model.vocab_size) == config
        # Nothing of what a run does is left to the preset that is read tomorrow.
        assert load_config(path, ["optimizer.preset=default"]).optimizer == config.optimizer.model_copy(
            update={"preset": "default"}
        )


@pytest.mark.slow
def test_uer_draws_all_but_layer_norms_alike():
    shapes = {"model__n_embd": 128, "model__vocab_size": 1000, "model__n_layer": 8, "model__n_positions": 64}
    config = changed(run_config(), **shapes)
    for path, array in start_weights(changed(config, model__initializer="uer")).items():
        if "ln_" in path:
            assert (array == (1 if path.endswith("scale") else 0)).all(), path
        else:
            assert array.std() == pytest.approx(0.02, rel=0.08), path
            assert abs(array.mean()) < 4 * 0.02 / array.size**0.5, path
            assert not np.array_equal(array[0], array[1]), path
    for path, array in start_weights(config).items():
        if path.endswith("bias"):
            assert not array.any(), path
        elif path.endswith("c_proj/kernel"):
            assert array.std() == pytest.approx(0.02 / math.sqrt(16), rel=0.03), path


@pytest.mark.slow
def test_thirty_steps_of_uer_equal_pytorch():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = changed(run_config(preset="uer"), model__initializer="uer")
    found = trained(config)

    sizes = {name: getattr(config.model, name) for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")}
    dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, **dropout, attn_implementation="eager", bos_token_id=0, eos_token_id=0)
    )
    start = start_weights(config)
    missing, surplus = model.load_state_dict(
        {name: torch.from_numpy(array.copy()) for name, array in to_state_dict(start).items()}, strict=False
    )
    assert (missing, surplus) == (["lm_head.weight"], [])
    model.tie_weights()

    parameters = dict(model.named_parameters())
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    losses = []
    for step, batch in enumerate(batches(config)):
        logits_BTV = model(torch.from_numpy(np.asarray(batch.tokens_BT, np.int64))).logits
        targets_N = torch.from_numpy(np.asarray(batch.targets_BT, np.int64)).reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits_BTV.reshape(targets_N.numel(), -1), targets_N)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        rate = 1e-3 * (step / 3 if step < 3 else (30 - step) / 27)  # as get_linear_schedule_with_warmup
        with torch.no_grad():
            for name, p in parameters.items():
                m, v = moments[name]
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                p.addcdiv_(m, v.sqrt() + 1e-6, value=-rate)  # no correction of the bias
                if not name.endswith("bias") and "ln_" not in name:
                    p.add_(p, alpha=-rate * 0.01)  # the decay comes after the step

    assert losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(found.losses, losses, rtol=0, atol=3e-6)
    after = to_state_dict(found.weights)
    for name, p in parameters.items():
        np.testing.assert_allclose(after[name], p.detach().numpy(), rtol=0, atol=1e-6, err_msg=name)
    for path, array in start.items():  # the first learning rate is 0
        np.testing.assert_array_equal(found.first[path], array, err_msg=path)
        assert not np.array_equal(found.weights[path], array), path


def test_the_state_of_adamw_keeps_the_paths_that_checkpoints_have():
    config = run_config()
    layout = state_layout(config, make_mesh(MeshSizes(), jax.devices()[:1]))
    paths = {rules.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(layout.opt_state)}
    of_model = {rules.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(layout.model)}
    assert paths == {"1/0/count", "1/2/count"} | {f"1/0/{name}/{path}" for name in ("mu", "nu") for path in of_model}
    for other in (run_config(decay_embeddings=True), run_config(schedule="wsd"), run_config(max_grad_norm=0.0)):
        found = state_layout(other, make_mesh(MeshSizes(), jax.devices()[:1])).opt_state
        assert {rules.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(found)} == paths


# Muon


def test_each_polynomial_of_polar_express_is_the_nearest_to_one():
    """The error of the best approximation reaches its maximum at four points, with alternating signs (Chebyshev)."""
    low, high = 0.01, 1.0
    for a, b, c in POLAR_EXPRESS:
        x = np.geomspace(low, high, 200_001)
        error = 1 - (a * x + b * x**3 + c * x**5)
        turns = np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1
        extremes = error[[0, *turns, -1]]
        assert (np.sign(extremes) == [1, -1, 1, -1]).all()
        np.testing.assert_allclose(np.abs(extremes), extremes[0], rtol=3e-3)
        low, high = 1 - extremes[0], 1 + extremes[0]
    assert low > 0.7  # of singular values from 0.01


def orthogonal(matrix):
    """The polynomials on the singular values of one float64 matrix."""
    u, singular, v = np.linalg.svd(matrix, full_matrices=False)
    singular = singular / np.linalg.norm(singular) / 1.02
    for a, b, c in POLAR_EXPRESS:
        singular = a * singular + b * singular**3 + c * singular**5
    return u * singular @ v


def matrices(path, kernel):
    """The (input, output) matrices in a stacked kernel; views, so that they can be assigned to."""
    for block in kernel:
        if path == "h/attn/c_attn/kernel":  # D, 3, H, K
            yield from (block[:, index].reshape(block.shape[0], -1) for index in range(3))
        else:  # H, K, D or D, F or F, D
            yield block.reshape(-1, block.shape[-1])


def random_model(config, seed):
    layout = state_layout(config, make_mesh(MeshSizes(), jax.devices()[:1]))
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), layout.model)


@pytest.mark.slow
def test_muon_orthogonalises_each_matrix_of_each_layer():
    config = run_config(name="muon", schedule="constant", warmup=0, weight_decay=0.3, max_grad_norm=0.0)
    tx, adamw = make_optimizer(config), make_optimizer(changed(config, optimizer__name="adamw"))
    params = random_model(config, 0)
    state, adamw_state = tx.init(params), adamw.init(params)
    start, momenta = weights_of(params), dict.fromkeys(KERNELS, 0.0)
    for step in range(1, 4):
        grads = random_model(config, step)
        updates, state = jax.jit(tx.update)(grads, state, params)
        adamw_updates, adamw_state = jax.jit(adamw.update)(grads, adamw_state, params)
        found, of_adamw = weights_of(updates), weights_of(adamw_updates)
        for path, gradient in weights_of(grads).items():
            if path not in KERNELS:
                if path.endswith(("/bias", "wpe/embedding")):
                    np.testing.assert_allclose(found[path], step / 200 * of_adamw[path], rtol=1e-6, err_msg=path)
                else:
                    np.testing.assert_array_equal(found[path], of_adamw[path], err_msg=path)
                continue
            momenta[path] = 0.95 * momenta[path] + 0.05 * gradient.astype(np.float64)
            looked_ahead = 0.95 * momenta[path] + 0.05 * gradient
            for update, direction, kernel in zip(
                *(matrices(path, array) for array in (found[path], looked_ahead, start[path])), strict=True
            ):
                expected = orthogonal(direction) * math.sqrt(max(direction.shape) / min(direction.shape))
                np.testing.assert_allclose(
                    update, -1e-3 * (expected + 0.3 * kernel), rtol=0, atol=1e-7, err_msg=f"{path} at {step}"
                )
                lengths = np.linalg.svd(update / -1e-3 - 0.3 * kernel, compute_uv=False)
                largest = math.sqrt(max(direction.shape) / min(direction.shape))
                assert lengths.max() == pytest.approx(largest, rel=0.3), path


def test_muon_warms_biases_and_positions_up_over_200_steps():
    config = run_config(400, name="muon", learning_rate=1e-2, warmup=0, schedule="constant", max_grad_norm=0.0)
    tx, params = make_optimizer(config), random_model(config, 0)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(1, 202):
        updates, state = update(params, state, params)  # of a constant gradient, so that Adam's updates are its signs
        if step in (1, 100, 199, 200, 201):
            found = {path: np.abs(array).max() for path, array in weights_of(updates).items() if path not in KERNELS}
            for path, largest in found.items():
                share = min(1, step / 200) if path.endswith(("/bias", "wpe/embedding")) else 1
                assert largest == pytest.approx(1e-2 * share, rel=1e-3), (path, step)


def test_muon_takes_kernels_and_only_them_and_keeps_one_moment_of_each():
    config = run_config(name="muon")
    layout = state_layout(config, make_mesh(MeshSizes(data=1, fsdp=2, tensor=4)))
    kernels = {rules.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(layout.model)}
    assert sorted(path for path in kernels if path.endswith("kernel")) == KERNELS
    specs = {
        rules.path_of(path): leaf.sharding.spec for path, leaf in jax.tree_util.tree_leaves_with_path(layout.model)
    }
    moments = {rules.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(layout.opt_state)}
    for path, spec in specs.items():
        found = [leaf.sharding.spec for name, leaf in moments.items() if name.endswith("/" + path)]
        assert found == [spec] * (1 if path in KERNELS else 2), path


@pytest.mark.slow
def test_muon_has_the_same_losses_on_every_mesh_and_learns_as_fast_as_adamw(capfd):
    config = run_config(name="muon", learning_rate=1e-2)
    found = trained(config).losses
    np.testing.assert_allclose(trained(config, shape=(2, 2, 2)).losses, found, rtol=1e-5)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    adamw = trained(changed(config, optimizer__name="adamw")).losses
    assert found[-1] < adamw[-1] + 0.05
    assert found[-1] < found[0] - 1


@pytest.mark.slow
def test_a_muon_run_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path):
    config = run_config(6, name="muon", learning_rate=1e-2)
    whole = trained(config, shape=(2, 2, 2))
    half = trained(config, 3, (2, 2, 2)).state
    with CheckpointStore(tmp_path / "checkpoints", keep=1) as store:
        store.save(3, half.model, half.opt_state, {})
    mesh = make_mesh(MeshSizes(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh), CheckpointStore(tmp_path / "checkpoints") as store:
        layout = state_layout(config, mesh)
        state = half._replace(**store.restore(3, model=layout.model, opt_state=layout.opt_state))
        step = make_train_step(config, layout, mesh)
        for batch in list(batches(config))[3:]:
            state, metrics = step(state, on_devices(batch, mesh))
    assert float(metrics.loss) == whole.losses[-1]
    for path, array in weights_of(state.model).items():
        np.testing.assert_array_equal(array, whole.weights[path], err_msg=path)
