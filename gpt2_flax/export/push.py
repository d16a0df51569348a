"""Upload an exported folder to the Hugging Face hub, if its files are as they were exported."""

from pathlib import Path
from typing import Any

from gpt2_flax.checkpoint.checksums import SUMS, check_sums, read_sums
from gpt2_flax.checkpoint.hub import connected, said
from gpt2_flax.errors import ExitCode, UserError, quote

# Files of an earlier push that would be loaded in place of the new files.
_STALE = [
    *("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"),
    *("*.gguf", "vocab.txt", "spiece.model", "tokenizer.model", "special_tokens_map.json"),
]


def push(folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload `folder` in one commit and return the address of the commit.

    A missing repository or branch is made. Weights and tokenizer files on the hub that `folder` lacks are deleted. The
    token is `HF_TOKEN`, or from `hf auth login`.

    Raises:
        UserError: NO_INPUT if there is no folder; DATA if it is not as exported or the hub rejects its model card;
            USAGE for a missing package or token, or a bad name; CANT_CREATE if the token may not write, or a public
            repository was to be private; IO if the hub cannot be reached.
    """
    check_whole(folder)
    with connected(repo_id, lambda error: _refusal(error, repo_id)) as hub:
        if hub.get_token() is None:
            fix = "run: hf auth login, or set HF_TOKEN to a token that may write"
            raise UserError(ExitCode.USAGE, "no token for the Hugging Face hub", repo_id, fix)
        return _upload(hub.HfApi(library_name="gpt2_flax"), folder, repo_id, private, revision)


def check_whole(folder: Path) -> None:
    """Raise `UserError` unless `folder` holds exactly the files of an export, unchanged."""
    fix = "give a folder that gpt2-flax export has made"
    if not folder.is_dir():
        raise UserError(ExitCode.NO_INPUT, "folder not found", folder, fix)
    if not (folder / SUMS).is_file():
        raise UserError(ExitCode.DATA, f"no {SUMS} in the folder", folder, fix)
    expected = {*read_sums(folder / SUMS), SUMS}
    found = {path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    if missing := sorted(expected - found):
        raise UserError(ExitCode.DATA, "file missing", folder / missing[0], "export the folder again")
    if surplus := sorted({path.name for path in folder.iterdir()} - expected):
        raise UserError(ExitCode.DATA, "not a file of the export", folder / surplus[0], "move it somewhere else")
    check_sums(folder, sorted(expected - {SUMS}))


def _upload(api: Any, folder: Path, repo_id: str, private: bool, revision: str | None) -> str:
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        fix = "make it private on the hub, choose another name, or leave --private out"
        raise UserError(ExitCode.CANT_CREATE, "repository exists and is public", repo_id, fix)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    message = f"Model exported by gpt2_flax ({folder.resolve().name})"
    try:
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message, delete_patterns=_STALE
        )
    except ValueError as error:
        if isinstance(error, OSError):  # an answer with status 400 is both
            raise
        fix = f"export again with other --language, --license or --dataset ({quote(str(error), 300)})"
        raise UserError(ExitCode.DATA, "the hub does not take the model card", folder / "README.md", fix) from None
    return str(commit.commit_url)


def _refusal(error: Any, repo_id: str) -> UserError:
    status = error.response.status_code
    if status == 401:
        fix = f"run: hf auth login, or set HF_TOKEN to a token that is valid ({said(error)})"
        return UserError(ExitCode.USAGE, "the hub does not know the token", repo_id, fix)
    if status == 403:
        fix = f"use a token with write access to it, or another name ({said(error)})"
        return UserError(ExitCode.CANT_CREATE, "the token may not write there", repo_id, fix)
    return UserError(ExitCode.IO, f"the hub answered with status {status}", repo_id, f"it says: {said(error)}")
