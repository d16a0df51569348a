import itertools
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.configs import changed
from support.rows import batches_of

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.prepare import prepare
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.parallel import rules
from gpt2_flax.parallel.device_batches import device_batch, prefetch
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.tokenizers.tokenizer import load_tokenizer
from gpt2_flax.training import loop, validation
from gpt2_flax.training.optimizer import learning_rate, make_optimizer
from gpt2_flax.training.step import initial_state, make_train_step, state_layout

MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}


def with_vocab(config):
    return changed(config, model__vocab_size=TokenDataset(config.data.dataset).info.vocab_size)


def losses(config, shape, steps=20):
    """Losses of `steps` training steps on a mesh of the given shape."""
    config = with_vocab(config)
    mesh = make_mesh(
        MeshSizes(**dict(zip(("data", "fsdp", "tensor"), shape, strict=True))), jax.devices()[: math.prod(shape)]
    )
    loader = batches_of(TokenDataset(config.data.dataset).train, config.data.seq_length, seed=0)
    n_rows, found = config.data.global_batch_size, []
    with jax.set_mesh(mesh):
        layout = state_layout(config, mesh)
        state, step = initial_state(config, layout), make_train_step(config, layout, mesh)
        for number in range(steps):
            batch = device_batch(mesh, n_rows, loader.batch, number * n_rows)
            state, metrics = step(state, batch)
            found.append(float(metrics.loss))
        assert step._cache_size() == 1
    return found


@pytest.fixture(scope="module")
def reference_losses(dataset_folder):
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_losses_are_the_same_on_every_mesh(config, mesh, reference_losses, capfd):
    dropout = dict.fromkeys(("model__embd_pdrop", "model__resid_pdrop", "model__attn_pdrop"), 0.1)
    config = changed(config, training__total_steps=20, **dropout)
    found = losses(config, MESHES[mesh])
    expected = reference_losses.setdefault("losses", found)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[-1] < 0.8 * found[0]
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
def test_accumulation_changes_no_loss(config):
    whole = losses(config, (2, 1, 1), steps=5)
    np.testing.assert_allclose(losses(changed(config, training__accumulation_steps=4), (2, 1, 1), 5), whole, rtol=1e-5)


@pytest.mark.slow
def test_every_parameter_has_one_rule_and_every_rule_a_parameter(config):
    model = jax.eval_shape(lambda: GPT2(with_vocab(config).model, rngs=nnx.Rngs(0)))
    paths = {rules.path_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
    mesh = make_mesh(MeshSizes(data=2, fsdp=2, tensor=2))
    for path, shape in paths.items():
        spec = rules.spec_of(path, shape, mesh)
        assert len(spec) == len(shape)
        split = any(axes for axes in spec)
        assert split == (path.endswith("/kernel") or path in ("wte/embedding", "h/attn/c_attn/bias", "h/mlp/c_fc/bias"))
    for pattern, _ in rules.RULES:
        assert any(rules.re.search(pattern, path) for path in paths), f"dead rule {pattern}"
    with pytest.raises(ValueError, match="no rule for h/new/kernel"):
        rules.spec_of("h/new/kernel", (2, 2), mesh)


def test_optimizer_moments_lie_as_their_parameters(config):
    layout = state_layout(with_vocab(config), make_mesh(MeshSizes(data=1, fsdp=4, tensor=2)))
    specs = {
        rules.path_of(path): leaf.sharding.spec for path, leaf in jax.tree_util.tree_leaves_with_path(layout.model)
    }
    moments = {rules.path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(layout.opt_state)}
    for path, spec in specs.items():
        found = [leaf.sharding.spec for name, leaf in moments.items() if name.endswith(path)]
        assert found == [spec, spec], path


@pytest.mark.slow
def test_optimizer_equals_adamw_in_float64(config):
    config = changed(with_vocab(config), optimizer__max_grad_norm=0.5, training__total_steps=20)
    tx, rate, chosen = make_optimizer(config), learning_rate(config), config.optimizer
    model = GPT2(config.model, rngs=nnx.Rngs(0))
    state, update = tx.init(model), jax.jit(tx.update)
    names = [rules.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)]
    params = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(model)]
    moments = [(np.zeros_like(array), np.zeros_like(array)) for array in params]
    draw = np.random.default_rng(0)
    for step in range(1, 6):
        grads = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), model)
        updates, state = update(grads, state, model)
        model = optax.apply_updates(model, updates)
        arrays = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)]
        norm = math.sqrt(sum((array**2).sum() for array in arrays))
        for index, (name, g) in enumerate(zip(names, arrays, strict=True)):
            g = g * min(1.0, 0.5 / norm)
            m, v = moments[index]
            m, v = chosen.b1 * m + (1 - chosen.b1) * g, chosen.b2 * v + (1 - chosen.b2) * g**2
            moments[index] = m, v
            direction = m / (1 - chosen.b1**step) / (np.sqrt(v / (1 - chosen.b2**step)) + chosen.eps)
            decay = chosen.weight_decay if name.endswith("kernel") else 0.0
            params[index] = params[index] - float(rate(step - 1)) * (direction + decay * params[index])
    for name, leaf, expected in zip(names, jax.tree.leaves(model), params, strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-5, atol=2e-6, err_msg=name)


def test_prefetch_keeps_order_and_passes_on_the_exception_of_its_thread():
    def make(item):
        if item == 4:
            raise ValueError("row 4")
        return item * 2

    made = prefetch(make, range(9))
    assert [next(made) for _ in range(4)] == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="row 4"):
        next(made)


def logged(config, name="train/loss"):
    """Values of a metric by step, as strings of exact digits; the last line of a step counts."""
    lines = [json.loads(line) for line in RunFolder(config.output).metrics.read_text().splitlines()]
    return {line["step"]: line[name].hex() for line in lines if name in line}


@pytest.mark.slow
@pytest.mark.parametrize("prompt_separator", [0.0, 0.5])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(config, tmp_path, monkeypatch, prompt_separator):
    config = changed(config, model__resid_pdrop=0.1, data__prompt_separator=prompt_separator)
    loop.train(config)
    whole = logged(config)
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]

    parts = changed(config, output=str(tmp_path / "parts"))
    ask, calls = loop.StopRequest.__call__, itertools.count(1)

    def stop_at_four(self, *ahead):
        if next(calls) == 5:  # the fourth was after the batch of the evaluation at step 3
            signal.raise_signal(signal.SIGTERM)
        return ask(self, *ahead)

    monkeypatch.setattr(loop.StopRequest, "__call__", stop_at_four)
    with pytest.raises(UserError, match="stopped at step 4, saved") as stopped:
        loop.train(parts)
    assert stopped.value.exit_code == ExitCode.TRY_AGAIN
    monkeypatch.undo()
    loop.train(parts)
    assert logged(parts) == whole


@pytest.mark.slow
def test_a_signal_during_an_evaluation_does_not_wait_for_its_end(config, tmp_path, monkeypatch):
    config = changed(config, training__evaluation_batches=0)
    loop.train(config)
    parts, asked = changed(config, output=str(tmp_path / "parts")), []
    sums_of_batches, evaluation_of = validation.sums_of_batches, validation.evaluation_of

    def signalled(*arguments):
        for sums in sums_of_batches(*arguments):
            asked.append(sums)
            signal.raise_signal(signal.SIGTERM)
            yield sums

    monkeypatch.setattr(validation, "sums_of_batches", signalled)
    with pytest.raises(UserError, match="stopped at step 3, saved"):
        loop.train(parts)
    assert len(asked) == 1
    asked.clear()
    monkeypatch.setattr(validation, "sums_of_batches", sums_of_batches)
    monkeypatch.setattr(validation, "evaluation_of", lambda *others: asked.append(evaluation_of(*others)) or asked[-1])
    loop.train(parts)
    at_three, at_six = asked  # the evaluation that was left is made up for before step 4
    assert at_three.tokens == at_six.tokens > 2 * parts.data.global_batch_size * parts.data.seq_length
    assert logged(parts) == logged(config)
    assert logged(parts, "validation/loss") == logged(config, "validation/loss")


@pytest.mark.slow
def test_a_run_goes_on_over_another_mesh(config, capsys):
    loop.train(changed(config, mesh__fsdp=8))
    before = logged(config)
    keys = {"training__total_steps": 8, "mesh__fsdp": 2, "mesh__tensor": 2}
    loop.train(changed(config, **keys), allow_change=["training.total_steps"])
    assert "resumed from step 6" in capsys.readouterr().out
    assert sorted(logged(config)) == list(range(1, 9))
    assert {step: loss for step, loss in logged(config).items() if step <= 6} == before


@pytest.mark.slow
def test_a_finished_run_says_so_and_changes_nothing(config, capsys):
    loop.train(config)
    before = RunFolder(config.output).metrics.read_bytes()
    loop.train(config)
    assert "has all its 6 steps" in capsys.readouterr().out
    assert RunFolder(config.output).metrics.read_bytes() == before


@pytest.mark.slow
def test_a_diverged_run_stops_and_never_saves_the_bad_state(config):
    config = changed(config, optimizer__learning_rate=1e38, optimizer__max_grad_norm=0.0, optimizer__warmup=0)
    with pytest.raises(UserError, match="at step") as diverged:
        loop.train(changed(config, training__save_every=1))
    assert diverged.value.exit_code == ExitCode.DIVERGED
    assert diverged.value.what == "loss nan at step 6, skipped steps in a row: 5"
    saved = [int(path.name) for path in RunFolder(config.output).checkpoints.iterdir() if path.name.isdecimal()]
    assert saved == [1]  # what comes after has seen no more good steps


@pytest.mark.slow
def test_the_resolved_config_of_a_run_starts_the_same_run(config, tmp_path):
    from gpt2_flax.config.file import load_config

    loop.train(config)
    again = load_config(RunFolder(config.output).config, [f"output={tmp_path / 'again'}"])
    assert again.model.vocab_size == TokenDataset(config.data.dataset).info.vocab_size
    loop.train(again)
    assert logged(again) == logged(config)


@pytest.mark.slow
def test_init_from_takes_the_weights_and_nothing_else(config, tmp_path, capsys):
    loop.train(config)
    second = changed(config, output=str(tmp_path / "second"), init_from=config.output)
    loop.train(second)
    assert "16 parameter arrays, 27,968 parameters; fresh optimizer" in capsys.readouterr().out
    first, second = ([float.fromhex(loss) for loss in logged(run).values()] for run in (config, second))
    assert second[0] < first[2]


@pytest.mark.slow
def test_other_training_tokens_are_refused_at_resume_unless_allowed(config, tokenizer_folder, tmp_path, capsys):
    loop.train(changed(config, training__total_steps=3))
    (tmp_path / "other.txt").write_text("".join(f"山河{'大鸟' * n}\n" for n in range(1, 60)), encoding="utf-8")
    other = tmp_path / "other"
    prepare([str(tmp_path / "other.txt")], load_tokenizer(tokenizer_folder), other, validation_fraction=0.1)
    config = changed(config, data__dataset=str(other))
    with pytest.raises(UserError, match="holds other training tokens") as error:
        loop.train(config, allow_change=["training.total_steps"])
    assert error.value.exit_code == ExitCode.CONFIG
    loop.train(config, allow_change=["training.total_steps", "data.dataset"])
    assert sorted(logged(config)) == [1, 2, 3, 4, 5, 6]
