"""Puts an exported folder on the Hugging Face hub, as it was written: what has changed since is not published."""

from pathlib import Path
from types import ModuleType
from typing import Any

from gpt2_flax.checkpoint.checksums import SUMS, check_sums, read_sums
from gpt2_flax.errors import ExitCode, UserError, missing_package, quote

# What an earlier push may have left there, and what would be loaded in place of the new files.
_STALE = (
    *("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"),
    *("*.gguf", "vocab.txt", "spiece.model", "tokenizer.model", "special_tokens_map.json"),
)


def push(folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads `folder` in one commit and returns its address; makes repository and branch when they are missing.

    The token is that of `HF_TOKEN` or of `hf auth login`. Weights and tokenizer files there that `folder` lacks are
    deleted. Raises `UserError`: NO_INPUT when there is no folder, DATA when it is not as it was exported or the hub
    does not take its model card, USAGE for a missing package or token or a name that cannot be, CANT_CREATE when the
    token may not write there or a public repository was to be private, IO when the hub cannot be reached.
    """
    check_whole(folder)
    hub = _import_hub(folder)
    if hub.get_token() is None:
        fix = "run: hf auth login, or set HF_TOKEN to a token that may write"
        raise UserError(ExitCode.USAGE, "no token for the Hugging Face hub", repo_id, fix)
    # The base class of what the HTTP library under the hub's own raises: not the same one in all versions.
    network_error = hub.errors.HfHubHTTPError.__mro__[1]
    try:
        return _upload(hub.HfApi(library_name="gpt2_flax"), folder, repo_id, private, revision)
    except hub.errors.OfflineModeIsEnabled:
        fix = "unset HF_HUB_OFFLINE and run the same command again"
        raise UserError(ExitCode.USAGE, "the hub is switched off", repo_id, fix) from None
    except hub.errors.HfHubHTTPError as error:
        raise _refusal(error, repo_id) from None
    except (network_error, OSError) as error:
        fix = f"check the network and run the same command again ({type(error).__name__}: {quote(str(error))})"
        raise UserError(ExitCode.IO, "the hub cannot be reached", hub.constants.ENDPOINT, fix) from None
    except hub.errors.HFValidationError as error:
        raise UserError(
            ExitCode.USAGE, "not the name of a repository", quote(repo_id), quote(str(error), 200)
        ) from None
    except ValueError as error:  # what is wrong with the header of README.md
        fix = f"export again with other --language, --license or --dataset ({quote(str(error), 300)})"
        raise UserError(ExitCode.DATA, "the hub does not take the model card", folder / "README.md", fix) from None


def check_whole(folder: Path) -> None:
    """Raises `UserError` unless `folder` is an exported one, with the files that were written and no others."""
    if not folder.is_dir():
        raise UserError(ExitCode.NO_INPUT, "folder not found", folder, "give a folder that gpt2-flax export has made")
    if not (folder / SUMS).is_file():
        fix = "give a folder that gpt2-flax export has made"
        raise UserError(ExitCode.DATA, f"no {SUMS} in the folder", folder, fix)
    expected = {*read_sums(folder / SUMS), SUMS}
    found = {path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()}
    if missing := sorted(expected - found):
        raise UserError(ExitCode.DATA, "file missing", folder / missing[0], "export the folder again")
    if surplus := sorted({path.name for path in folder.iterdir()} - expected):
        raise UserError(ExitCode.DATA, "not a file of the export", folder / surplus[0], "move it somewhere else")
    check_sums(folder, sorted(expected - {SUMS}))


def _import_hub(folder: Path) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise missing_package("push", "huggingface_hub", "push", folder) from None
    return huggingface_hub


def _upload(api: Any, folder: Path, repo_id: str, private: bool, revision: str | None) -> str:
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        fix = "make it private on the hub, choose another name, or leave --private out"
        raise UserError(ExitCode.CANT_CREATE, "repository exists and is public", repo_id, fix)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=f"Model exported by gpt2_flax ({folder.resolve().name})",
        delete_patterns=list(_STALE),
    )
    return str(commit.commit_url)


def _refusal(error: Any, repo_id: str) -> UserError:
    status = error.response.status_code
    said = quote(error.server_message or str(error), 200)
    if status == 401:
        fix = f"run: hf auth login, or set HF_TOKEN to a token that is valid ({said})"
        return UserError(ExitCode.USAGE, "the hub does not know the token", repo_id, fix)
    if status == 403:
        fix = f"use a token with write access to it, or another name ({said})"
        return UserError(ExitCode.CANT_CREATE, "the token may not write there", repo_id, fix)
    return UserError(ExitCode.IO, f"the hub answered with status {status}", repo_id, f"it says: {said}")
