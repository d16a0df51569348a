"""UER-py's published command lines, unchanged but for sizes: two stages and a conversion, as processes."""

import importlib
import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.checkpoint.weights import logits_of
from gpt2_flax.errors import ExitCode

torch = pytest.importorskip("torch")
from support.uer_model import trained  # noqa: E402 -- needs torch

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]

TINY = {  # as UER-py's models/gpt2/config.json
    "emb_size": 32,
    "feedforward_size": 128,
    "hidden_size": 32,
    "hidden_act": "gelu_fast",
    "heads_num": 4,
    "layers_num": 2,
    "max_seq_length": 64,
    "dropout": 0.1,
    "data_processor": "lm",
    "embedding": ["word", "pos"],
    "remove_embedding_layernorm": True,
    "encoder": "transformer",
    "mask": "causal",
    "layernorm_positioning": "pre",
    "target": ["lm"],
    "tie_weights": True,
}

PUBLISHED = r"""
python3 preprocess.py --corpus_path corpora/cluecorpussmall.txt \
                      --vocab_path models/google_zh_vocab.txt \
                      --dataset_path cluecorpussmall_lm_seq128_dataset.pt \
                      --seq_length 16 --processes_num 32 --data_processor lm

python3 pretrain.py --dataset_path cluecorpussmall_lm_seq128_dataset.pt \
                    --vocab_path models/google_zh_vocab.txt \
                    --config_path models/gpt2/config.json \
                    --output_model_path models/cluecorpussmall_gpt2_seq128_model.bin \
                    --world_size 8 --gpu_ranks 0 1 2 3 4 5 6 7 \
                    --total_steps 4 --save_checkpoint_steps 2 --report_steps 1 \
                    --learning_rate 1e-4 --batch_size 2

python3 preprocess.py --corpus_path corpora/cluecorpussmall.txt \
                      --vocab_path models/google_zh_vocab.txt \
                      --dataset_path cluecorpussmall_lm_seq1024_dataset.pt \
                      --seq_length 64 --processes_num 32 --data_processor lm

python3 pretrain.py --dataset_path cluecorpussmall_lm_seq1024_dataset.pt \
                    --vocab_path models/google_zh_vocab.txt \
                    --pretrained_model_path models/cluecorpussmall_gpt2_seq128_model.bin-4 \
                    --config_path models/gpt2/config.json \
                    --output_model_path models/cluecorpussmall_gpt2_seq1024_model.bin \
                    --world_size 8 --gpu_ranks 0 1 2 3 4 5 6 7 \
                    --total_steps 3 --save_checkpoint_steps 3 --report_steps 1 \
                    --learning_rate 5e-5 --batch_size 1

python3 scripts/convert_gpt2_from_uer_to_huggingface.py \
    --input_model_path models/cluecorpussmall_gpt2_seq1024_model.bin-3 \
    --output_model_path pytorch_model.bin \
    --layers_num 2
"""


@pytest.fixture(scope="module")
def folder(corpus, tokenizer_folder, tmp_path_factory):
    """A folder with the files that the published commands name."""
    folder = tmp_path_factory.mktemp("uer")
    (folder / "corpora").mkdir()
    (folder / "corpora" / "cluecorpussmall.txt").write_bytes(corpus.read_bytes())
    (folder / "models" / "gpt2").mkdir(parents=True)
    (folder / "models" / "google_zh_vocab.txt").write_bytes((tokenizer_folder / "vocab.txt").read_bytes())
    (folder / "models" / "gpt2" / "config.json").write_text(json.dumps(TINY))
    return folder


def call(folder, line):
    _, script, *arguments = shlex.split(line)
    command = [sys.executable, str(ROOT / "scripts" / Path(script).name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def outputs(folder):
    """What each of the published commands printed."""
    printed = []
    for line in PUBLISHED.replace("\\\n", " ").strip().split("\n\n"):
        done = call(folder, line)
        assert done.returncode == 0, done.stderr + done.stdout
        printed.append(done.stdout)
    return printed


@pytest.mark.slow(20)
def test_the_published_commands_run_and_show_what_they_stand_for(folder, outputs):
    assert "gpt2-flax prepare corpora/cluecorpussmall.txt --tokenizer models/google_zh_vocab.txt" in outputs[0]
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 gpt2-flax train models/" in outputs[1]
    assert "layer_norm_epsilon 1e-07, which belongs to these weights" in outputs[4]
    one, two = (
        tomllib.loads((folder / "models" / f"cluecorpussmall_gpt2_seq{length}_model.toml").read_text())
        for length in (128, 1024)
    )
    assert (one["data"]["seq_length"], one["data"]["global_batch_size"]) == (16, 16)
    assert (two["data"]["seq_length"], two["data"]["global_batch_size"]) == (64, 8)
    assert one["optimizer"] | {"learning_rate": 5e-5} == two["optimizer"]
    assert one["optimizer"]["preset"] == "uer"
    assert one["model"] == two["model"]
    assert "init_from" not in one
    assert two["init_from"] == "models/cluecorpussmall_gpt2_seq128_model/checkpoints/4"
    checkpoints = folder / "models" / "cluecorpussmall_gpt2_seq128_model" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} >= {"2", "4"}


@pytest.mark.slow(20)
def test_what_comes_out_is_the_model_for_transformers(folder, outputs):
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(folder))
    state_dict = torch.load(folder / "pytorch_model.bin", weights_only=True)
    model.load_state_dict(state_dict)
    assert all(tensor.is_contiguous() for tensor in state_dict.values())
    source = load_source(folder / "models" / "cluecorpussmall_gpt2_seq1024_model")
    assert source.step == 3
    tokens = np.random.default_rng(0).integers(0, source.model.vocab_size, (2, 64))
    with torch.inference_mode():
        theirs = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(theirs - logits_of(source.weights, source.model, tokens)).max() < 1e-5
    assert transformers.GPT2LMHeadModel.from_pretrained(folder).config.eos_token_id == 3


@pytest.mark.slow(20)
def test_a_file_of_uer_is_converted_exactly_and_goes_on_training(folder, outputs):
    size = load_source(folder / "models" / "cluecorpussmall_gpt2_seq1024_model").model.vocab_size
    model = trained(20, (size, 64, 2, 32, 4))
    torch.save(model.state_dict(), folder / "models" / "theirs.bin-20")
    done = call(
        folder,
        "python3 convert_gpt2_from_uer_to_huggingface.py --input_model_path models/theirs.bin-20 "
        "--output_model_path theirs/pytorch_model.bin --layers_num 2 --uer_config models/gpt2/config.json",
    )
    assert done.returncode == 0, done.stderr
    assert "those of UER-py within" in done.stdout
    assert "without ids of [CLS]" in done.stdout
    transformers = pytest.importorskip("transformers")
    converted = transformers.GPT2LMHeadModel.from_pretrained(folder / "theirs").eval()
    tokens = torch.arange(64)[None] % size
    with torch.inference_mode():
        assert (converted(tokens).logits - model(tokens)).abs().max() < 1e-4
    again = call(
        folder,
        "python3 convert_gpt2_from_uer_to_huggingface.py --input_model_path models/theirs.bin-20 "
        "--output_model_path pytorch_model_2.bin --layers_num 3 --uer_config models/gpt2/config.json",
    )
    assert again.returncode == ExitCode.USAGE
    assert "--layers_num is 3 but there are 2 layers" in again.stderr
    done = call(
        folder,
        "python3 pretrain.py --dataset_path cluecorpussmall_lm_seq128_dataset.pt --vocab_path "
        "models/google_zh_vocab.txt --config_path models/gpt2/config.json --pretrained_model_path models/theirs.bin-20 "
        "--output_model_path models/on.bin --total_steps 1 --batch_size 8 --seq_length 32",
    )
    assert done.returncode == 0, done.stderr
    assert "gpt2-flax import models/theirs.bin-20 models/on_pretrained" in done.stdout
    assert "starting from models/on_pretrained at step 0" in done.stdout


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("preprocess.py --data_processor mlm --corpus_path a --vocab_path b", "invalid choice: 'mlm'"),
        ("preprocess.py --data_processor lm --corpus_path a", "no tokenizer, or two"),
        ("preprocess.py --data_processor lm --corpus_path a --vocab_path b --dynamic_masking", "it is not for lm"),
        ("preprocess.py --data_processor lm --corpus_path a --vocab_path b --seq_length 0", "must be above 0"),
        ("pretrain.py {} --deepspeed", "mesh.fsdp"),
        ("pretrain.py {} --log_path=a", "metrics.jsonl"),
        ("pretrain.py {} --tgt_vocab_path a", "it is not for lm"),
        ("pretrain.py {} --layernorm t5", "layernorm 't5' is not supported"),
        ("pretrain.py {} --do_lower_case false --vocab_path models/google_zh_vocab.txt", "another vocabulary"),
        ("pretrain.py {} --nonsense 3", "--nonsense; leave it out"),
        ("pretrain.py {} --mask fully_visible", "mask 'fully_visible' is not supported"),
        ("pretrain.py {} --world_size 2 --gpu_ranks 0 1 2", "do not fit"),
        ("pretrain.py {} --vocab_path models/other.txt", "made with another vocabulary"),
        ("pretrain.py {} --pretrained_model_path models/gone.bin-3", "no model found"),
        ("pretrain.py {} --config_path models/gone.json", "file not found"),
    ],
)
def test_what_has_no_place_here_is_refused_with_what_to_do(folder, outputs, line, said, monkeypatch, capsys):
    (folder / "models" / "other.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n")
    given = "--dataset_path cluecorpussmall_lm_seq128_dataset.pt --config_path models/gpt2/config.json "
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr(sys, "argv", line.format(given + "--output_model_path models/new.bin").split())
    script = importlib.import_module(Path(sys.argv[0]).stem)
    code = importlib.import_module("uer_command_line").exit_code(script.main)
    assert code in (ExitCode.USAGE, ExitCode.DATA, ExitCode.NO_INPUT)
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert not (folder / "models" / "new").exists()


def test_older_flags_and_all_others_become_a_config(folder, outputs):
    done = call(
        folder,
        "python3 pretrain.py --dataset_path cluecorpussmall_lm_seq128_dataset.pt --config_path models/gpt2/config.json "
        "--output_model_path models/old.bin --world_size 16 --gpu_ranks 8 9 10 11 12 13 14 15 "
        "--master_ip tcp://host0:12345 --total_steps 100 --save_checkpoint_steps 20 --accumulation_steps 2 "
        "--embedding word_pos --remove_embedding_layernorm --encoder transformer --mask causal "
        "--layernorm_positioning pre --target lm --tie_weight --fp16 --deep_init --dropout 0.0 --seed 3 --beta2 0.95 "
        "--warmup 0.05 --scheduler cosine --batch_size 4 --translate_only",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 gpt2-flax train models/old.toml "
        "--coordinator host0:12345 --num-processes 2 --process-id 1\n"
    )
    values = tomllib.loads((folder / "models" / "old.toml").read_text())
    assert values["data"]["global_batch_size"] == 4 * 16 * 2
    assert values["training"]["total_steps"] == 50
    assert values["training"]["save_every"] == 10
    assert values["training"]["keep_checkpoints"] == 5
    assert values["model"]["dtype"] == "bfloat16"
    assert values["model"]["initializer"] == "gpt2"
    assert values["model"]["embd_pdrop"] == 0.0
    assert values["optimizer"]["schedule"] == "cosine"
