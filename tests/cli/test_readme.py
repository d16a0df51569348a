"""The commands and programs of the READMEs do what they say, in their order, with a small corpus and model."""

import re
import shlex
from pathlib import Path

import pytest

import gpt2_flax
from gpt2_flax import __main__ as cli

pytestmark = pytest.mark.slow(seconds=20)

ROOT = Path(__file__).parents[2]
SMALLER = {
    **{"model.n_positions": 32, "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32, "model.dtype": "float32"},
    **{"data.seq_length": 32, "data.global_batch_size": 8, "growth.n_layer": 1, "training.total_steps": 4},
}


def section(readme: str, heading: str) -> list[tuple[str, str]]:
    """The languages and contents of the fenced blocks below a heading."""
    text = (ROOT / readme).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)


def run(line: str) -> None:
    """Call a command of this program with a smaller vocabulary and model."""
    name, command, *words = shlex.split(line, comments=True)
    assert name == "gpt2-flax"
    if command == "tokenizer":
        words[words.index("--vocab-size") + 1] = "320"
    if command in ("train", "plan"):
        words += [f"{key}={value}" for key, value in SMALLER.items()]
    if command == "train" and words[0] == "quickstart":  # the reader runs this one, or the one with `base`
        words.append("output=runs/quickstart")
    if command != "serve":  # a server does not end
        assert cli.exit_code([command, *words]) == 0, line


@pytest.fixture
def folder(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = corpus.read_text(encoding="utf-8").splitlines()
    for name in ("corpus", "novels"):
        (tmp_path / name).mkdir()
        for part in range(4):
            (tmp_path / name / f"{part}.txt").write_text("\n".join(lines[part::4]), encoding="utf-8")
    (tmp_path / "held.txt").write_text("\n".join(lines[:20]), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("readme", "heading", "exported"),
    [("README.md", "Your own text", "exported"), ("README.zh.md", "用自己的小说训练", "novels-gpt2")],
)
def test_from_text_to_a_model_of_transformers(folder, readme, heading, exported):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for language, content in section(readme, heading):
        if language == "bash":
            for line in content.replace("\\\n", " ").splitlines():
                run(line)
        else:
            exec(compile(re.sub(r"max_length=\d+", "max_length=20", content), readme, "exec"), {})
    assert (folder / exported / "model.safetensors").is_file()


def test_the_program_runs(folder, monkeypatch, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    train, make = gpt2_flax.train, gpt2_flax.train_tokenizer
    monkeypatch.setattr(gpt2_flax, "train", lambda config, values: train(config, values | SMALLER))
    monkeypatch.setattr(gpt2_flax, "train_tokenizer", lambda *given, **more: make(*given, vocab_size=100, **more))
    ((_, content),) = section("README.md", "From Python")
    assert section("README.zh.md", "在 Python 里用") == [("python", content)]
    exec(compile(content.replace("max_new_tokens=100", "max_new_tokens=5"), "README.md", "exec"), {})
    text, bits = capsys.readouterr().out.splitlines()[-2:]
    assert text.startswith("这是很久之前的事情了")
    assert 0 < float(bits) < 20
