"""The commands and programs of the documents do what they say, with a small corpus, vocabulary and model."""

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.documents import blocks

import gpt2_flax
from gpt2_flax import __main__ as cli

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.slow(seconds=8)

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALLER = {
    **{"model.n_positions": 32, "model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32, "model.dtype": "float32"},
    **{"data.seq_length": 32, "data.global_batch_size": 8, "training.total_steps": 4},
    "training.save_every": 1,
}
QUICK = {"optimizer.name": "adamw"}  # compiles in half the time of Muon
GROWN, WHOLE = {"growth.n_layer": 1}, {"growth.until": 0}  # a run that grows compiles two programs
STEPS = {"optimizer.warmup": 1, "growth.until": 2}  # in place of steps that a command names
ELSEWHERE = {
    "hf://": "tests/checkpoint/test_hub.py has a fake hub",
    "import uer/": "tests/checkpoint/test_hub.py has a fake hub",
    "s3://": "tests/data/test_ray.py and tests/data/test_prepare.py read and write addresses",
    "plan --budget 24h --topology h100:8 --dataset": "the corpus here is too small; tests/plan/test_budget.py",
    "gpt2-flax serve": "a server does not end; tests/serve",
    "gpt2-flax doctor": "takes minutes; tests/doctor",
}

RAN: set[str] = set()  # commands and programs


def programs(page: Path, what: str) -> list[str]:
    """The programs of a page that contain a word."""
    return [program for program in blocks(page.read_text(encoding="utf-8"), "python") if what in program]


def our_commands(page: Path) -> list[str]:
    """The lines of a page's blocks of bash that call this program and that this module can run."""
    lines = "".join(blocks(page.read_text(encoding="utf-8"), "bash")).replace("\\\n", " ")
    found = (line.partition(" #")[0].partition(";")[0] for line in lines.splitlines() if "gpt2-flax " in line)
    return [line for line in found if line.startswith("gpt2-flax ") and not any(what in line for what in ELSEWHERE)]


def run(line: str) -> None:
    """Call a command with a smaller vocabulary and model; a folder that it writes may not exist yet."""
    RAN.add(line)
    line, _, redirected = line.partition(">")
    _, command, *words = shlex.split(line)
    for option, value in (("--vocab-size", "320"), ("--workers", "1"), ("--average", "2")):
        if option in words and command not in ("train", "plan"):
            words[words.index(option) + 1] = value
    if command in ("train", "plan") and "--budget" not in words:
        smaller = SMALLER | ({} if "cluecorpussmall" in words[0] else QUICK)
        if words[0] in ("base", "quickstart", "run.toml"):
            smaller |= GROWN if "growth" in line else WHOLE
        smaller |= {key: value for key, value in STEPS.items() if any(word.startswith(f"{key}=") for word in words)}
        words += [f"{key}={value}" for key, value in smaller.items()]
    output = io.StringIO()
    with contextlib.redirect_stdout(output) if redirected else contextlib.nullcontext():
        assert cli.exit_code([command, *words]) == 0, line
    if redirected:
        Path(redirected.strip()).write_text(output.getvalue(), encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(corpus, tmp_path_factory):
    """A folder with all that the documents' commands read."""
    folder = tmp_path_factory.mktemp("documents")
    lines = corpus.read_text(encoding="utf-8").splitlines()
    for name in ("corpus", "novels", "corpora", "models", "data"):
        (folder / name).mkdir()
        for part in range(4):
            (folder / name / f"{part}.txt").write_text("\n".join(lines[part::4]), encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(line[:5] for line in lines[:4]), encoding="utf-8")
    for name in ("held.txt", "cluecorpussmall.txt", "corpora/cluecorpussmall.txt"):
        (folder / name).write_text("\n".join(lines[:40]), encoding="utf-8")
    (folder / "configs").symlink_to(ROOT / "configs")
    with contextlib.chdir(folder):
        for line in our_commands(ROOT / "README.md"):  # tokenizer, data/mine, runs/mine, exported
            run(line)
        run("gpt2-flax convert runs/mine uer --format uer")
        for name, source in (("model.bin",) * 2, ("config.json", "uer_config.json"), ("vocab.txt",) * 2):
            shutil.copy(f"uer/{source}", name)
        for name in ("google_zh_vocab.txt", "models/google_zh_vocab.txt"):
            shutil.copy("vocab.txt", name)
        shutil.copy("exported/tokenizer.json", "tokenizer.json")
        for name in ("train.bin", "val.bin"):
            (np.arange(2000, dtype=np.uint16) % 40).tofile(name)
        for name in ("data/zh", "data/en", "data/novels", "data/cluecorpussmall", "quickstart/dataset"):
            shutil.copytree("data/mine", name)
        for name in ("runs/novels", "runs/other", "runs/one"):
            shutil.copytree("runs/mine", name)
        for name in ("runs/start", "imported"):
            run(f"gpt2-flax import exported {name}")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if our_commands(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run_in_their_order(page, workplace, tmp_path, monkeypatch):
    """A command that an earlier page has too ran there; the others make their outputs new."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "copy"
    shutil.copytree(workplace, folder, symlinks=True)
    monkeypatch.chdir(folder)
    for line in our_commands(page):
        if line not in RAN:
            outputs = re.findall(r" (?:--output |train .*output=|(?:export|import|convert) \S+ )(\S+)", line)
            for output in outputs:
                shutil.rmtree(output, ignore_errors=True)
            run(line)
            assert all(Path(output).exists() for output in outputs), line
    for program in programs(page, "TextGenerationPipeline"):
        if program not in RAN:
            RAN.add(program)
            exec(compile(re.sub(r"max_length=\d+", "max_length=20", program), page.name, "exec"), {})


def test_the_program_runs(workplace, tmp_path, monkeypatch, capsys):
    shutil.copytree(workplace / "corpus", tmp_path / "corpus")
    shutil.copy(workplace / "held.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    train, make = gpt2_flax.train, gpt2_flax.train_tokenizer
    monkeypatch.setattr(gpt2_flax, "train", lambda config, values: train(config, values | SMALLER | WHOLE | QUICK))
    monkeypatch.setattr(gpt2_flax, "train_tokenizer", lambda *given, **more: make(*given, vocab_size=100, **more))
    english, chinese = (programs(page, "gpt2_flax") for page in PAGES[:2])
    assert english == chinese
    exec(compile(english[0].replace("max_new_tokens=100", "max_new_tokens=5"), "README.md", "exec"), {})
    text, bits = capsys.readouterr().out.splitlines()[-2:]
    assert text.startswith("这是很久之前的事情了")
    assert 0 < float(bits) < 20
