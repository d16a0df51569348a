"""`scripts/benchmark_recipe.py`: what it computes from runs, and a small comparison that is stopped and resumed."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.configs import changed

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.model.flops import flops_per_token

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_recipe.py"
spec = importlib.util.spec_from_file_location("benchmark_recipe", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
sys.modules["benchmark_recipe"] = benchmark
spec.loader.exec_module(benchmark)


def run(flops, bits, seed=0, recipe="a"):
    return benchmark.Run(recipe, 64, 16, 1.0, seed, int(flops), flops, flops / 10, bits, {}, f"{recipe}{flops}{seed}")


def test_lists_are_tried_in_every_combination():
    recipe = {"optimizer": {"learning_rate": [1, 2], "name": "muon"}, "data": {"global_batch_size": [8, 16]}}
    found = list(benchmark.variants(recipe))
    assert [tuned for _, tuned in found] == [
        {"optimizer.learning_rate": rate, "data.global_batch_size": batch} for rate in (1, 2) for batch in (8, 16)
    ]
    for variant, tuned in found:
        assert variant["optimizer"] == {"learning_rate": tuned["optimizer.learning_rate"], "name": "muon"}
        assert variant["data"] == {"global_batch_size": tuned["data.global_batch_size"]}
    assert list(benchmark.variants({"optimizer": {"b2": 0.9}})) == [({"optimizer": {"b2": 0.9}}, {})]


@given(st.lists(st.floats(0.5, 9), min_size=2, max_size=5, unique=True), st.floats(0.1, 10), st.randoms())
def test_compute_is_read_off_the_line_over_its_logarithm(bits, goal, draw):
    bits.sort(reverse=True)
    compute = np.cumprod([10.0, *(draw.uniform(1.1, 4) for _ in bits[1:])])
    found = benchmark.compute_to(draw.sample([*zip(compute, bits, strict=True)], len(bits)), goal)
    if goal < bits[-1]:
        assert found is None
    else:
        expected = np.exp(np.interp(-goal, [-bit for bit in bits], np.log(compute)))
        assert found.value == pytest.approx(expected)
        assert found.is_least == (goal > bits[0])


def test_ratios_compare_equal_seeds_at_equal_bits():
    first = [run(1e3, 5.0), run(4e3, 4.0), run(1e3, 5.2, 1), run(4e3, 4.2, 1)]
    better = [run(1e2, 5.0, recipe="b"), run(1e3, 3.0, recipe="b"), run(2e2, 5.0, 1, "b"), run(2e3, 3.4, 1, "b")]
    found = benchmark.ratios(first, better, "flops")
    assert [ratio.value for ratio in found] == pytest.approx([4e3 / (1e2 * 10**0.5), 4e3 / (2e2 * 10**0.5)])
    assert [ratio.value for ratio in benchmark.ratios(first, first, "seconds")] == pytest.approx([1, 1])
    assert benchmark.written(found) == "9.49x (6.32 to 12.65)"
    assert benchmark.written(benchmark.ratios(better, first, "flops")) == "-"
    assert (
        benchmark.written(benchmark.ratios(first, [run(1e2, 3.0), run(2e2, 2.9)], "flops"))
        == ">40.00x (40.00 to 40.00)"
    )


def test_a_run_is_found_again_by_what_its_numbers_depend_on(dataset_folder):
    dataset = TokenDataset(dataset_folder)
    config = benchmark.run_config({}, 2, 32, 16, 4096, 0, 128)
    key = benchmark.run_key(config, dataset)
    for same in ({"output": "elsewhere"}, {"training__save_every": 7, "training__logging": []}):
        assert benchmark.run_key(changed(config, **same), dataset) == key
    others = [{"training__seed": 1}, {"training__total_steps": 33}, {"model__n_layer": 3}, {"optimizer__warmup": 0.5}]
    others += [{"data__global_batch_size": 16}, {"growth__until": 0.5, "growth__n_layer": 1}]
    assert len({key, *(benchmark.run_key(changed(config, **other), dataset) for other in others)}) == 1 + len(others)


@pytest.mark.parametrize(("steps", "saved"), [(320, range(250, 321, 10)), (64, range(50, 65, 2)), (8, (7, 8))])
def test_an_average_is_of_the_last_share_of_the_steps(dataset_folder, steps, saved):
    config = benchmark.run_config({"average": 0.25}, 2, 32, 16, 128 * steps, 0, 128)
    training = config.training
    assert training.total_steps == steps
    every = range(training.save_every, steps + 1, training.save_every)
    assert list(every)[-training.keep_checkpoints :] == list(saved)
    keys = {
        benchmark.run_key(benchmark.run_config(recipe, 2, 32, 16, 128 * steps, 0, 128), TokenDataset(dataset_folder))
        for recipe in ({}, {"average": 0.25}, {"average": 0.5})
    }
    assert len(keys) == 3


def test_products_of_the_optimizer_are_counted():
    model = ModelConfig(vocab_size=100, n_positions=32, n_layer=2, n_head=4, n_embd=32)
    config = benchmark.run_config({}, 2, 32, 16, 4096, 0, 128)
    adam = benchmark.run_config({"optimizer": {"name": "adamw"}}, 2, 32, 16, 4096, 0, 128)
    products = 0
    for rows, columns in [(32, 32)] * 4 + [(32, 128)] * 2:
        products += 2 * 3 * (2 * rows * rows * columns + 2 * rows**3 + 2 * rows * rows * columns)
    difference = benchmark.optimizer_flops(model, config) - benchmark.optimizer_flops(model, adam)
    assert difference == products
    untied = model.model_copy(update={"tie_word_embeddings": False})
    assert benchmark.optimizer_flops(untied, config) - benchmark.optimizer_flops(model, config) == 15 * 100 * 32
    assert config.training.total_steps == 4096 // 128
    growth = {"growth": {"until": 0.25, "n_layer": 1, "seq_length": 8}}
    growing = benchmark.run_config(growth, 2, 32, 16, 4096, 0, 128)
    smaller, sizes = growing.with_vocab_size(100), {"vocab_size": 100, "n_positions": 16, "n_embd": 32, "n_head": 1}
    one, two = (ModelConfig(n_layer=layers, **sizes) for layers in (1, 2))
    expected = 8 * benchmark.optimizer_flops(one, config) + 24 * benchmark.optimizer_flops(two, config)
    expected += 128 * (8 * flops_per_token(one, 8) + 24 * flops_per_token(two, 16))
    assert benchmark.run_flops(smaller) == expected


@pytest.mark.parametrize("path", sorted(SCRIPT.parent.glob("recipes*.toml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_project_are_configs(path):
    for recipe in tomllib.loads(path.read_text(encoding="utf-8")).values():
        recipe.pop("budgets")
        for variant, _ in benchmark.variants(recipe):
            benchmark.run_config(variant, 2, 64, 128, 10_000, 0, 1024)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_comparison_is_resumed_and_repeats_no_run(corpus, tmp_path):
    (tmp_path / "recipes.toml").write_text(
        'a = {optimizer = {name = "adamw", learning_rate = [1e-3, 1e-2]}, budgets = [1]}\n'
        'b = {data = {packing = "document"}, budgets = [1], average = 0.25}\n'
    )
    command = [sys.executable, SCRIPT, "--folder", tmp_path / "out", "--corpus", corpus, "--widths", "32"]
    command += ["--recipes", tmp_path / "recipes.toml", "--lengths", "16", "--layers", "1"]
    command += ["--step-positions", "128", "--positions", "1024"]

    def call(*more):
        options = {"check": True, "capture_output": True, "text": True, "encoding": "utf-8"}
        return subprocess.run([*command, *more], env=os.environ | {"XLA_FLAGS": ""}, **options).stdout

    call("--only", "a", "--seeds", "0", "1")
    results = tmp_path / "out/results.jsonl"
    lines = results.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3  # both learning rates with the first seed, and the better one with the other seed
    printed = call("--seeds", "0")
    assert results.read_text(encoding="utf-8").splitlines()[:3] == lines
    found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert [(run["recipe"], run["seed"]) for run in found[3:]] == [("b", 0)]
    assert found[0]["tuned"] == {"optimizer.learning_rate": 1e-3}
    assert len({run["key"] for run in found}) == len(found)
    assert printed.splitlines()[-2].startswith("| a | ")
    assert printed.splitlines()[-2].endswith("| 1.00x (1.00 to 1.00) | 1.00x (1.00 to 1.00) |")
