"""Models on the Hugging Face hub: their files in the cache of `huggingface_hub`, and its errors."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt2_flax.errors import ExitCode, UserError, io_error, missing_package, quote
from gpt2_flax.folders import HubModel

_SMALL_FILES = ["*config.json", "*tokens*.json", "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "*.model"]
_SAFETENSORS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
_PYTORCH = ["pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"]


def download(model: HubModel) -> tuple[Path, str]:
    """Bring the newest files of a model into the cache, or only find them there if the hub cannot be reached.

    Weights in PyTorch's format come only if the model has no safetensors.

    Returns:
        The folder in the cache, and the commit, as 40 hexadecimal digits.

    Raises:
        UserError: NO_INPUT if there is no such model or revision; USAGE if `huggingface_hub` is missing; IO if the hub
            cannot be reached and the cache does not have the model.
    """
    before = "" if os.path.lexists(model.repo_id) else "no such path here, and "  # which the user may have meant
    with connected(model.repo_id, lambda error: _refusal(error, model), before) as hub:
        wanted = [*_SMALL_FILES, *_SAFETENSORS]
        folder = Path(hub.snapshot_download(model.repo_id, revision=model.revision, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            revision = folder.name  # whatever happens to the branch in between
            folder = Path(hub.snapshot_download(model.repo_id, revision=revision, allow_patterns=_PYTORCH))
        return folder, folder.name


@contextlib.contextmanager
def connected(repo_id: str, refusal: Callable[[Any], UserError], before: str = "") -> Iterator[Any]:
    """Yield the package `huggingface_hub`, and turn its errors in the block into `UserError`.

    Args:
        repo_id: The repository that the block reads or writes.
        refusal: Makes a `UserError` from an `HfHubHTTPError`.
        before: Begins the sentence that says why there is no hub.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise missing_package(f"{before}the Hugging Face hub", "huggingface_hub", "hub", repo_id) from None
    # The base class of the errors of the HTTP library under the hub's client, which differs between versions.
    network_error: type[Exception] = errors.HfHubHTTPError.__mro__[1]
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield hub
    except errors.HfHubHTTPError as error:
        raise refusal(error) from None
    except (network_error, OSError) as error:
        if constants.HF_HUB_OFFLINE:
            fix = "unset HF_HUB_OFFLINE and run the same command again"
            raise UserError(ExitCode.USAGE, f"{before}the hub is switched off", repo_id, fix) from None
        if isinstance(error, OSError) and error.errno:  # a full disk, for example
            raise io_error(error, error.filename or repo_id) from None
        fix = f"check the network, or set HF_ENDPOINT to a mirror ({type(error).__name__}: {quote(str(error))})"
        raise UserError(
            ExitCode.IO, f"{before}the hub cannot be reached", f"{constants.ENDPOINT}/{repo_id}", fix
        ) from None
    except errors.HFValidationError as error:
        fix = quote(str(error), 200)
        raise UserError(ExitCode.USAGE, "not the name of a repository", quote(repo_id), fix) from None


def said(error: Any) -> str:
    """Return what the hub said in an `HfHubHTTPError`, as printable ASCII."""
    return quote(error.server_message or str(error), 200)


def _refusal(error: Any, model: HubModel) -> UserError:
    status, name, repo_id = error.response.status_code, type(error).__name__, model.repo_id
    if name == "GatedRepoError":
        fix = "ask for access on its page, then run: hf auth login, or set HF_TOKEN"
        return UserError(ExitCode.NO_INPUT, "the owner of the model must give you access", repo_id, fix)
    if name == "RevisionNotFoundError":
        fix = "give a branch, a tag or a commit of the repository"
        return UserError(ExitCode.NO_INPUT, "the model has no such revision on the hub", model, fix)
    if status in (401, 404):
        fix = "check the name; for a private model run: hf auth login, or set HF_TOKEN"
        return UserError(ExitCode.NO_INPUT, "no such model here or on the Hugging Face hub", repo_id, fix)
    return UserError(ExitCode.IO, f"the hub answered with status {status}", repo_id, f"it says: {said(error)}")
