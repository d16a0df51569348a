"""Models and corpora of the hub: the same as their files, from the cache without a network, and clear refusals."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.configs import changed
from support.fake_hub import fake_hub
from support.weight_folders import CONFIG, random_weights

import gpt2_flax
from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config.file import load_config
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.transformers_folder import export_folder
from gpt2_flax.folders import HubModel, model_place
from gpt2_flax.text.corpus import corpus_units
from gpt2_flax.tokenizers.train import train_wordpiece
from gpt2_flax.training import loop

huggingface_hub = pytest.importorskip("huggingface_hub")

NAME = "somebody/a-model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model as `export` writes it."""
    tokenizer = train_wordpiece(["这是很久之前的事情了"] * 3, 50)
    config = CONFIG.model_copy(update={"vocab_size": tokenizer.vocab_size})
    output = tmp_path_factory.mktemp("exported") / "model"
    export_folder(random_weights(config), config, tokenizer, output, card="---\nlicense: mit\n---\n", verify=False)
    return output


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub with the model, and an empty cache."""
    from huggingface_hub import constants

    with fake_hub() as hub:
        hub.repository = NAME
        hub.branches["main"] = content(folder)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield hub


def refusal(name: str = NAME, **arguments) -> tuple[ExitCode, str]:
    with pytest.raises(UserError) as error:
        gpt2_flax.load(name, **arguments)
    return error.value.exit_code, str(error.value)


# Names


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("somebody/a-model", HubModel("somebody/a-model")),
        ("somebody/a-model@v1.2", HubModel("somebody/a-model", "v1.2")),
        ("hf://somebody/a.model_2@refs/pr/1", HubModel("somebody/a.model_2", "refs/pr/1")),
        ("here/nothing", Path("here/nothing")),
        ("hf://here/run", HubModel("here/run")),
        ("file", Path("file")),
        ("a/b/c", Path("a/b/c")),
        ("./a/b", Path("a/b")),
        ("/a/b", Path("/a/b")),
        ("../a", Path("../a")),
        ("一/二", Path("一/二")),
    ],
)
def test_a_name_is_a_path_if_something_like_it_is_here_and_else_a_model_on_the_hub(given, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/run").mkdir(parents=True)
    assert model_place(given) == place
    if isinstance(place, HubModel):
        assert model_place(str(place), guess=False) == place
    if "://" not in given:
        assert model_place(given, guess=False) == Path(given)


@pytest.mark.parametrize(
    "given", ["hf://gpt2", "hf://a/b/c", "hf://a/b@", "hf://datasets/a/b", "hf://../a", "s3://a/b"]
)
def test_other_addresses_are_refused(given):
    with pytest.raises(ValueError, match=re.escape(given)):
        model_place(given)


# Models


def test_a_model_of_the_hub_is_the_model_of_its_files(hub, folder):
    hub.branches["main"] |= {"pytorch_model.bin": b"not read", "onnx/model.onnx": b"not read", "train.py": b"not read"}
    model, local = gpt2_flax.load(NAME), gpt2_flax.load(folder)
    assert {"pytorch_model.bin", "train.py", "onnx/model.onnx", "README.md"}.isdisjoint(hub.read)
    ids = local.encode("这是很久之前")
    assert model.encode("这是很久之前") == ids
    np.testing.assert_array_equal(model.logits(ids), local.logits(ids))
    assert model.origin == f"{NAME} at commit {hub.commit_of('main')[:12]} of the Hugging Face hub"


def test_without_a_network_the_cache_answers(hub, folder, monkeypatch):
    from huggingface_hub import constants

    gpt2_flax.load(NAME)
    hub.read.clear()
    assert gpt2_flax.load(f"hf://{NAME}").origin.startswith(NAME), "the same files again"
    assert hub.read == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert gpt2_flax.load(NAME).origin == f"{NAME} at commit {hub.commit_of('main')[:12]} of the Hugging Face hub"
    assert refusal("somebody/another") == (
        ExitCode.USAGE,
        "no such path here, and the hub is switched off: somebody/another; "
        "unset HF_HUB_OFFLINE and run the same command again",
    )


def test_a_revision_is_a_branch_or_a_commit(hub, folder):
    hub.branches["v2"] = content(folder) | {"README.md": b"another card"}
    newer = hub.commit_of("v2")
    for name, revision in ((NAME, "v2"), (f"{NAME}@v2", None), (f"{NAME}@v2", "v2"), (NAME, newer)):
        assert newer[:12] in gpt2_flax.load(name, revision=revision).origin
    code, said = refusal(revision="v3")
    assert (code, said.partition(":")[0]) == (ExitCode.NO_INPUT, "the model has no such revision on the hub")
    assert refusal(f"{NAME}@v2", revision="v3")[0] == ExitCode.USAGE
    assert refusal(str(folder), revision="v2")[0] == ExitCode.USAGE


def test_weights_of_pytorch_are_read_if_there_are_no_others_and_never_unpickled(hub, folder, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    files = content(folder)
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    del files["model.safetensors"]
    hub.branches["main"] = files | {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    ids = [1, 2, 3]
    np.testing.assert_array_equal(gpt2_flax.load(NAME).logits(ids), gpt2_flax.load(folder).logits(ids))
    torch.save({"transformer.wte.weight": Path("a class that weights do not need")}, tmp_path / "hostile.bin")
    hub.branches["main"] = files | {"pytorch_model.bin": (tmp_path / "hostile.bin").read_bytes()}
    code, said = refusal()
    assert code == ExitCode.DATA
    assert "damaged or unsafe PyTorch file" in said


def test_training_starts_from_a_model_of_the_hub(hub, folder, config, tmp_path):
    cfg = changed(config, training__total_steps=1)
    model = {name: getattr(cfg.model, name) for name in ("n_positions", "n_layer", "n_head", "n_embd", "dtype")}
    exported, from_hub, from_folder = (tmp_path / name for name in ("exported", "from-hub", "from-folder"))
    tokenizer = TokenDataset(str(cfg.data.dataset)).tokenizer()
    wanted = CONFIG.model_copy(update=model | {"vocab_size": tokenizer.vocab_size})
    export_folder(random_weights(wanted), wanted, tokenizer, exported, card="x", verify=False)
    hub.branches["v1"] = content(exported)
    loop.train(changed(cfg, output=str(from_hub), init_from=f"hf://{NAME}@v1"))
    loop.train(changed(cfg, output=str(from_folder), init_from=str(exported)))
    assert load_config(RunFolder(from_hub).config).init_from == f"hf://{NAME}@v1"
    ours, same = gpt2_flax.load(from_hub), gpt2_flax.load(from_folder)
    np.testing.assert_array_equal(ours.logits([1, 2, 3]), same.logits([1, 2, 3]))


def test_what_is_not_there_or_not_allowed_is_one_sentence(hub, monkeypatch):
    from huggingface_hub import constants

    code, said = refusal("somebody/another")
    assert (code, said.partition(":")[0]) == (ExitCode.NO_INPUT, "no such model here or on the Hugging Face hub")
    hub.gated = True
    code, said = refusal()
    assert (code, said.partition(":")[0]) == (ExitCode.NO_INPUT, "the owner of the model must give you access")
    hub.gated, hub.status = False, 500
    code, said = refusal()
    assert code == ExitCode.IO
    assert "reach" in said or "status 500" in said
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, said = refusal("runs/mine")
    assert code == ExitCode.IO
    assert said.startswith("no such path here, and the hub cannot be reached: http://127.0.0.1:9/runs/mine; check")

    def full_disk(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device", "blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full_disk)
    assert refusal() == (ExitCode.IO, "disk full: blob; free some space and run the same command again")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, said = refusal()
    assert code == ExitCode.USAGE
    assert "pip install 'gpt2_flax[hub]'" in said


# Corpora


def test_a_corpus_of_the_hub_is_read_as_its_files_are(hub, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lines = [f"document {number}" for number in range(300)]
    parquet.write_table(pyarrow.table({"text": lines[:200]}), tmp_path / "b.parquet", row_group_size=50)
    rest = "".join(f'{{"text": "{line}"}}\n' for line in lines[200:])
    hub.branches["main"] = {"data/a.jsonl": rest.encode(), "data/b.parquet": (tmp_path / "b.parquet").read_bytes()}
    (tmp_path / "a.jsonl").write_text(rest)

    def texts(*sources: str) -> list[str]:
        batches = (
            batch for unit in corpus_units(sources) for batch in unit.batches(lambda problem: pytest.fail(str(problem)))
        )
        return [text for batch in batches for text in batch.texts]

    local = texts(str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet"))
    for name in ("", "/data", "/data/*"):
        assert texts(f"hf://datasets/{NAME}{name}") == local
    assert texts(f"hf://datasets/{NAME}@main/data/a.jsonl") == lines[200:]
    with pytest.raises(UserError) as error:
        corpus_units([f"hf://datasets/{NAME}/data/c.jsonl"])
    assert error.value.exit_code == ExitCode.NO_INPUT


# The command line


@pytest.mark.parametrize(
    "command",
    ["generate {} --prompt 这是", "serve {}", "evaluate {}", "export {} out", "import {} out", "convert {} out"],
)
def test_every_command_reads_the_revision_that_is_asked_for(hub, capsys, command):
    code = cli.exit_code([*command.format(NAME).split(), "--revision", "no-such-branch"])
    error = capsys.readouterr().err
    assert code == ExitCode.NO_INPUT
    assert f"hf://{NAME}@no-such-branch" in error
    assert error.count("\n") == 1


@pytest.mark.multiprocess
def test_commands_take_names_of_the_hub(hub, tmp_path):
    def command(*arguments: str) -> str:
        own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(__file__).parents[2]), "NO_PROXY": "*"}
        line = [sys.executable, "-m", "gpt2_flax", *arguments]
        done = subprocess.run(line, env=os.environ | own, capture_output=True, text=True, timeout=200, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    said = command("import", NAME, "run", "--revision", "main")
    assert said.startswith(f"run: {len(random_weights(CONFIG))} parameter arrays of hf://{NAME}")
    assert gpt2_flax.load("run").origin == "run at step 0"
    lines = [f"这是很久之前的事情了{'了' * (number % 7)}" for number in range(400)]
    records = [f'{{"text": "{line}"}}\n' for line in lines]
    hub.branches["main"] = {f"part-{part}.jsonl": "".join(records[part::4]).encode() for part in range(4)}
    for name, part in hub.branches["main"].items():
        (tmp_path / name).write_bytes(part)
    with_workers = ["--tokenizer", "run/tokenizer", "--workers", "2"]
    command("prepare", f"hf://datasets/{NAME}", "--output", "from-hub", *with_workers)
    command("prepare", *sorted(hub.branches["main"]), "--output", "from-files", *with_workers)
    from_hub, from_files = (
        [ids.tolist() for ids in gpt2_flax.Dataset(name).documents()] for name in ("from-hub", "from-files")
    )
    assert from_hub == from_files
