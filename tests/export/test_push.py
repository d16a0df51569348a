"""Only what was exported, and as it was exported, gets onto the hub."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_hub import TOKEN, fake_hub
from support.weight_folders import random_weights

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.push import check_whole, push
from gpt2_flax.export.transformers_folder import export_folder
from gpt2_flax.tokenizers.train import train_wordpiece

pytest.importorskip("huggingface_hub")


@pytest.fixture
def folder(tmp_path):
    tokenizer = train_wordpiece(["这是很久之前的事情了"], 60)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, n_positions=8, n_layer=1, n_head=1, n_embd=8)
    output = tmp_path / "model"
    export_folder(random_weights(config), config, tokenizer, output, card="---\nlicense: mit\n---\n", verify=False)
    return output


@pytest.fixture
def hub():
    with fake_hub() as hub:
        yield hub


def command(folder: Path, endpoint: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Runs the command in a process of its own: huggingface_hub reads the environment when it is imported."""
    names = ("HF_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    # Xet, the hub's own way for large files, cannot be imitated in a few lines: those of git-lfs are.
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder.parent / "home"), "HF_HUB_DISABLE_XET": "1"}
    path = {"PYTHONPATH": str(Path(__file__).parents[2]), "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-m", "gpt2_flax", "push", str(folder), *arguments],
        env=inherited | own | path | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout if done.returncode == 0 else done.stderr


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.multiprocess
def test_a_folder_arrives_whole_on_a_branch_of_a_private_repository(folder, hub):
    hub.branches["main"] = {"README.md": b"old", "model-00001-of-00002.safetensors": b"old", "notes.txt": b"stays"}
    code, said = command(folder, hub.address, "somebody/a-model", "--private", "--revision", "v2", HF_TOKEN=TOKEN)
    assert code == 0, said
    assert said.startswith(f"{folder}: {hub.address}/somebody/a-model/commit/")
    assert (hub.repository, hub.private) == ("somebody/a-model", True)
    assert hub.branches["v2"] == content(folder) | {"notes.txt": b"stays"}, "and no weights of an earlier push"
    assert hub.branches["main"]["README.md"] == b"old"
    assert hub.commits == ["Model exported by gpt2_flax (model)"]


@pytest.mark.multiprocess
def test_a_name_without_owner_is_the_users_own_and_may_be_pushed_to_again(folder, hub):
    for _ in range(2):
        code, said = command(folder, hub.address, "a-model", HF_TOKEN=TOKEN)
        assert code == 0, said
    assert (hub.repository, hub.private) == ("somebody/a-model", False)
    assert hub.branches["main"] == content(folder)


@pytest.mark.multiprocess
def test_what_was_to_be_private_does_not_go_where_it_is_public(folder, hub):
    hub.repository = "somebody/a-model"
    code, said = command(folder, hub.address, "somebody/a-model", "--private", HF_TOKEN=TOKEN)
    assert (code, hub.commits) == (ExitCode.CANT_CREATE, [])
    assert said.startswith("error: repository exists and is public: somebody/a-model; ")


@pytest.mark.multiprocess
def test_refusals_of_the_hub_are_one_sentence(folder, hub):
    code, said = command(folder, hub.address, "somebody/a-model", HF_TOKEN="hf_a_bad_one")
    assert code == ExitCode.USAGE
    assert said.startswith("error: the hub does not know the token: somebody/a-model; ")
    hub.refuses_writing = True
    code, said = command(folder, hub.address, "somebody/a-model", HF_TOKEN=TOKEN)
    assert code == ExitCode.CANT_CREATE
    assert said.startswith("error: the token may not write there: somebody/a-model; ")
    hub.refuses_writing, hub.card_error = False, '"license" must be one of [...]'
    code, said = command(folder, hub.address, "somebody/a-model", HF_TOKEN=TOKEN)
    assert code == ExitCode.DATA
    assert said.startswith(f"error: the hub does not take the model card: {folder / 'README.md'}; ")
    assert '"license" must be one of' in said
    assert hub.commits == []


@pytest.mark.multiprocess
def test_without_network_or_token_it_says_so(folder):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        code, said = command(folder, address, "somebody/a-model", HF_TOKEN=TOKEN)
    assert code == ExitCode.IO
    assert said.startswith(f"error: the hub cannot be reached: {address}/somebody/a-model; check the network")
    code, said = command(folder, address, "somebody/a-model")
    assert code == ExitCode.USAGE
    assert "hf auth login" in said
    code, said = command(folder, address, "somebody/a-model", HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert code == ExitCode.USAGE
    assert said.startswith("error: the hub is switched off: ")
    code, said = command(folder, address, "a/b/c", HF_TOKEN=TOKEN)
    assert code == ExitCode.USAGE
    assert said.startswith("error: not the name of a repository: 'a/b/c'; ")


# The folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        push(folder, "somebody/a-model")
    return f"{caught.value.exit_code.name} {caught.value}"


def test_a_whole_folder_is_accepted(folder):
    check_whole(folder)


def test_a_folder_that_is_not_there_or_not_ours_is_refused(folder):
    assert "NO_INPUT folder not found" in refusal(folder / "nowhere")
    (folder / "SHA256SUMS").unlink()
    assert "DATA no SHA256SUMS" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "config.json", "vocab.txt"])
def test_a_changed_file_is_refused(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert f"sha256 differs): {folder / name}" in refusal(folder)


def test_missing_and_surplus_files_are_refused(folder):
    (folder / "secret.txt").write_text("a password")
    assert f"DATA not a file of the export: {folder / 'secret.txt'}" in refusal(folder)
    (folder / "secret.txt").unlink()
    (folder / "runs").mkdir()
    assert f"DATA not a file of the export: {folder / 'runs'}" in refusal(folder)
    (folder / "runs").rmdir()
    (folder / "vocab.txt").rename(folder.parent / "vocab.txt")
    assert f"DATA file missing: {folder / 'vocab.txt'}" in refusal(folder)
    (folder / "vocab.txt").symlink_to(folder.parent / "vocab.txt")
    assert f"DATA file missing: {folder / 'vocab.txt'}" in refusal(folder)


def test_without_the_package_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'gpt2_flax[hub]'" in refusal(folder)
