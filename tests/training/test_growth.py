"""Runs whose first steps train fewer layers on shorter rows."""

import itertools
import json
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import changed
from support.rows import batches_of

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.checkpoint.weights import abstract_model, model_logits, weights_of
from gpt2_flax.config.file import load_config
from gpt2_flax.config.parse import parse_config
from gpt2_flax.config.schema import GrowthConfig
from gpt2_flax.data.batches import rows_of
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.packing import RowLayout, cut_rows
from gpt2_flax.errors import UserError
from gpt2_flax.model.flops import flops_of_steps, flops_per_token
from gpt2_flax.parallel.device_batches import device_batch
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.training import loop
from gpt2_flax.training.growth import first_layers, identity_above, stacked, with_first_layers
from gpt2_flax.training.step import initial_state, make_growth, make_train_step, state_layout


@pytest.fixture
def growing(config):
    """A model of three layers that has one, on rows of 8 tokens, in the first three of six steps."""
    growth = {"growth__until": 0.5, "growth__n_layer": 1, "growth__seq_length": 8}
    return changed(config, model__n_layer=3, model__resid_pdrop=0.1, **growth)


def with_vocab(config):
    return changed(config, model__vocab_size=TokenDataset(config.data.dataset).info.vocab_size)


def train(config, **options):
    """Train on one device, for which programs compile fastest."""
    loop.train(config, devices=jax.devices()[:1], **options)


def losses(config):
    """Training losses by step, as strings of exact digits; the last line of a step counts."""
    records = map(json.loads, RunFolder(config.output).metrics.read_text(encoding="utf-8").splitlines())
    return {record["step"]: record["train/loss"].hex() for record in records if "train/loss" in record}


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_cut_rows_hold_the_text_of_short_rows(dataset_folder, packing):
    split = TokenDataset(dataset_folder).train
    long = rows_of(split, RowLayout(24, packing))
    whole = long.batch(np.arange(long.n_rows))
    found = cut_rows(whole, 8)
    for whole_BT, found_BT in zip(whole[:3], found[:3], strict=True):
        np.testing.assert_array_equal(found_BT.reshape(-1, 24), whole_BT)
    for segments_T, positions_T in zip(found.segments_BT, found.positions_BT, strict=True):
        counted = [0]
        for before, after in itertools.pairwise(segments_T):
            counted.append(counted[-1] + 1 if before == after else 0)
        real_T = segments_T != 0
        np.testing.assert_array_equal(positions_T[real_T], np.array(counted)[real_T])
    if packing == "stream":
        short = rows_of(split, RowLayout(8))
        expected = short.batch(np.arange(short.n_rows))
        real_BT = expected.segments_BT != 0
        for name in ("tokens_BT", "targets_BT", "positions_BT"):
            found_BT = getattr(found, name)[: short.n_rows]
            np.testing.assert_array_equal(found_BT[real_BT], getattr(expected, name)[real_BT], name)


@pytest.mark.slow
def test_layers_above_are_the_identity_and_growth_copies(config):
    config = with_vocab(changed(config, model__n_layer=5, growth__until=3, growth__n_layer=2))
    draw, abstract = np.random.default_rng(0), abstract_model(config.model)
    model = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), abstract)
    smaller = first_layers(model, abstract_model(config.before_growth().model))
    tokens_BT = np.arange(30).reshape(2, 15)
    np.testing.assert_allclose(
        model_logits(identity_above(model, 2), tokens_BT), model_logits(smaller, tokens_BT), rtol=1e-5, atol=1e-5
    )
    for path, grown in weights_of(stacked(with_first_layers(model, smaller), 2)).items():
        before = weights_of(model)[path]
        np.testing.assert_array_equal(grown, before[[0, 1, 0, 1, 0]] if path.startswith("h/") else before, path)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "shape"), [("adamw", (1, 1, 1)), ("muon", (2, 2, 2))])
def test_a_step_before_growth_is_a_step_of_the_smaller_model(growing, optimizer, shape):
    config = with_vocab(changed(growing, optimizer__name=optimizer, optimizer__warmup=0))
    smaller = config.before_growth()
    mesh = make_mesh(MeshSizes(*shape), jax.devices()[: np.prod(shape)])
    loader = batches_of(TokenDataset(config.data.dataset).train, 16, seed=0)
    with jax.set_mesh(mesh):
        layout, small_layout = state_layout(config, mesh), state_layout(smaller, mesh)
        state, step = initial_state(config, layout), make_train_step(config, layout, mesh, grown=False)
        small = first_layers(initial_state(config, layout), small_layout)
        small_step = make_train_step(smaller, small_layout, mesh)
        untouched = [np.asarray(x)[1:] for x in jax.tree.leaves(state.model.h)]
        for first in (0, 16):
            batch = device_batch(mesh, 16, loader.batch, first)
            cut = device_batch(
                mesh, 32, lambda start, stop: cut_rows(loader.batch(start // 2, stop // 2), 8), 2 * first
            )
            state, metrics = step(state, batch)
            small, expected = small_step(small, cut)
            np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-6)
        for found, leaf in zip(jax.tree.leaves(first_layers(state, small)), jax.tree.leaves(small), strict=True):
            np.testing.assert_allclose(found, leaf, rtol=1e-4, atol=1e-5)
        for found, before in zip(jax.tree.leaves(state.model.h), untouched, strict=True):
            np.testing.assert_array_equal(np.asarray(found)[1:], before)
        grown = make_growth(config, layout)(state)
        for leaf in (*jax.tree.leaves(grown.model.h), *jax.tree.leaves(grown.opt_state)):
            copies = np.asarray(leaf)
            if copies.ndim and copies.shape[0] == 3:
                np.testing.assert_array_equal(copies, copies[[0, 0, 0]])
        _, metrics = make_train_step(config, layout, mesh)(grown, device_batch(mesh, 16, loader.batch, 32))
        assert np.isfinite(metrics.loss)


@pytest.mark.slow
def test_runs_that_stopped_near_their_growth_go_on_with_the_same_bits(growing, tmp_path, monkeypatch):
    train(growing)
    whole, ask = losses(growing), loop.StopRequest.__call__
    for last, call in ((2, 2), (3, 3), (4, 5)):  # call 4 is in the evaluation at step 3
        parts, calls = changed(growing, output=str(tmp_path / f"parts-{last}")), itertools.count(1)

        def stop(self, *ahead, call=call, calls=calls):
            if next(calls) == call:
                signal.raise_signal(signal.SIGTERM)
            return ask(self, *ahead)

        monkeypatch.setattr(loop.StopRequest, "__call__", stop)
        with pytest.raises(UserError, match=f"stopped at step {last}, saved"):
            train(parts)
        monkeypatch.setattr(loop.StopRequest, "__call__", ask)
        train(parts)
        assert losses(parts) == whole


@pytest.mark.slow
def test_a_model_grows_once_and_a_checkpoint_before_is_a_whole_model(growing, capsys):
    train(changed(growing, training__save_every=2))
    assert capsys.readouterr().out.count("grows to 3 layers") == 1
    early = load_source(RunFolder(growing.output).checkpoints / "2").weights
    assert [layer.any() for layer in early["h/mlp/c_proj/kernel"]] == [True, False, False]
    late = load_source(RunFolder(growing.output).checkpoints / "6").weights["h/mlp/c_proj/kernel"]
    assert np.abs(late[1] - late[0]).max() > 0
    with pytest.raises(UserError, match=r"checkpoint 2 is from before the model grew: .*; give --average 2"):
        load_source(RunFolder(growing.output).path, average=3)
    assert load_source(RunFolder(growing.output).path, average=2).averaged == [4, 6]
    # Half of 14 steps is step 7: a model that has grown at step 3 does not grow again.
    allowed = ["training.total_steps"]
    train(changed(growing, training__total_steps=14, training__save_every=2), allow_change=allowed)
    assert "grows to" not in capsys.readouterr().out


def test_flops_of_steps_are_those_of_both_models(growing):
    config = with_vocab(growing)
    smaller = config.before_growth()
    assert (smaller.model.n_layer, smaller.data.seq_length, smaller.data.global_batch_size) == (1, 8, 32)
    of_step = {
        step: flops_per_token(smaller.model, 8) if step <= 3 else flops_per_token(config.model, 16)
        for step in range(1, 7)
    }
    for first, last in itertools.combinations(range(7), 2):
        assert flops_of_steps(config, first, last) == 256 * sum(of_step[step] for step in range(first + 1, last + 1))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"until": 3}, "growth.until needs growth.n_layer or growth.seq_length"),
        ({"until": 3, "n_layer": 3}, "growth.n_layer 3 is above model.n_layer 2"),
        ({"until": 3, "seq_length": 5}, "data.seq_length 16 is not a multiple of growth.seq_length 5"),
        ({"until": 6, "n_layer": 1}, "growth.until is 6 steps, not between 0 and training.total_steps 6"),
        ({"until": 0.01, "n_layer": 1}, "growth.until is 0 steps, not between"),
        ({"until": 1.0, "n_layer": 1}, "growth.until 1.0 is neither"),
    ],
)
def test_a_growth_that_cannot_be_is_refused(config, keys, problem):
    with pytest.raises(UserError, match=problem):
        changed(config, **{f"growth__{key}": value for key, value in keys.items()})
    if "n_layer" in keys and keys.get("until") == 3:
        with pytest.raises(UserError, match=r"growth\.n_layer does not go with init_from"):
            changed(config, init_from="runs/before", growth__until=3, growth__n_layer=1)


def test_a_growth_of_a_config_can_be_switched_off():
    with pytest.raises(UserError, match=r"growth\.n_layer needs growth\.until: the steps or the share of the steps"):
        load_config(None, ["data.dataset=d", "output=r", "training.total_steps=9", "growth.n_layer=1"])
    overrides = ["data.dataset=d", "init_from=runs/before", "growth.until=0"]
    config = load_config(Path("base"), overrides)
    assert config.growth == GrowthConfig()
    assert parse_config(config.model_dump(exclude_none=True), "again") == config
    with pytest.raises(UserError, match=r"growth\.n_layer does not go with init_from.*set growth\.until = 0"):
        load_config(Path("base"), overrides[:2])
    with pytest.raises(UserError, match=r"growth\.layers"):
        load_config(Path("base"), [*overrides, "growth.layers=3"])
