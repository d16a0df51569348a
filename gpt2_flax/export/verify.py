"""Reads an exported folder back with `transformers` and compares it with our model: the proof that it is the same.

torch and transformers are imported here alone, inside the function; without them there is no verification.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gpt2_flax.checkpoint.tensor_files import TORCH_WEIGHTS, WEIGHTS
from gpt2_flax.config import ModelConfig
from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.text.tokenizer import Tokenizer

NOT_VERIFIED = "not verified, torch and transformers are not installed: pip install 'gpt2_flax[export]'"

_TEXTS = (
    "这是很久之前的事情了。",
    "The quick brown fox jumps over the lazy dog, 3.14 times!",
    "2024年。JAX和Flax在GPU上训练GPT-2模型。",
    "東京タワー — café naïve Straße",
    "emoji 😀, (brackets) and internationalization",
)


@dataclass(frozen=True)
class Verification:
    """What was compared, and the largest difference between two logits."""

    max_logit_difference: float
    max_logit: float
    tokens: int
    texts: int
    files: tuple[str, ...]
    transformers_version: str
    torch_version: str

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens equal those of transformers {self.transformers_version} within "
            f"{self.max_logit_difference:.1e}, token ids of {self.texts} texts are the same"
        )


def verify_folder(
    folder: Path, weights: Mapping[str, np.ndarray], config: ModelConfig, tokenizer: Tokenizer
) -> Verification | None:
    """Returns how closely `transformers` computes from `folder` what we compute from `weights`, both in float32.

    Returns None when torch or transformers is not installed: the caller should say `NOT_VERIFIED`.
    Raises `UserError` (BUG) when tensors are missing or surplus, logits differ, or token ids differ.
    """
    try:
        import torch
        import transformers
    except ImportError:
        return None
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, min(64, config.n_positions)))
    ours_BTV = _our_logits(weights, config, tokens_BT)
    files = tuple(name for name in (WEIGHTS, TORCH_WEIGHTS) if (folder / name).is_file())
    largest = float(np.abs(ours_BTV).max())
    # The noise of float32 is relative: 5e-6 where logits are below 10, above 1e-4 where they are near 100.
    limit = 1e-5 * max(10.0, largest)
    differences = []
    with _quiet(transformers):
        for name in files:
            model = _load(transformers, folder, name)
            with torch.inference_mode():
                theirs_BTV = model(torch.from_numpy(tokens_BT)).logits.float().numpy()
            differences.append(float(np.abs(ours_BTV - theirs_BTV).max()))
            if not differences[-1] <= limit < math.inf:  # also when one is not a number
                raise _bug(f"logits differ by {differences[-1]:.1e} where {limit:.1e} is allowed", folder / name)
        auto = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        _compare_tokenizers(tokenizer, auto, folder)
    versions = (transformers.__version__, torch.__version__)
    return Verification(max(differences), largest, tokens_BT.size, len(_TEXTS), files, *versions)


def _our_logits(weights: Mapping[str, np.ndarray], config: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray:
    import jax

    from gpt2_flax.checkpoint.weights import model_from_weights

    # "highest": on GPU and TPU a float32 product would otherwise be computed from rounded factors.
    with jax.default_matmul_precision("highest"):
        model = model_from_weights(config.model_copy(update={"dtype": "float32"}), dict(weights))
        return np.asarray(jax.jit(lambda model, tokens_BT: model(tokens_BT))(model, tokens_BT.astype(np.int32)))


def _load(transformers: ModuleType, folder: Path, name: str) -> Any:
    # ignore_mismatched_sizes: to be told of them like of the others, not by an exception.
    model, info = transformers.GPT2LMHeadModel.from_pretrained(
        folder,
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=name == WEIGHTS,
        ignore_mismatched_sizes=True,
    )
    problems = [f"{kind} {quote(sorted(map(str, info[kind]))[:5])}" for kind in info if info[kind]]
    if problems:
        raise _bug(f"transformers found {', '.join(problems)}", folder / name)
    return model


def _compare_tokenizers(ours: Tokenizer, theirs: Any, folder: Path) -> None:
    for text, ids in zip(_TEXTS, ours.encode_batch(_TEXTS), strict=True):
        if theirs(text, add_special_tokens=False)["input_ids"] != ids.tolist():
            raise _bug(f"AutoTokenizer gives other ids for {quote(text)}", folder)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    for name, our_id in zip(special, (ours.bos_id, ours.eos_id, ours.pad_id), strict=True):
        if our_id is not None and getattr(theirs, name) != our_id:
            raise _bug(f"AutoTokenizer has {name} {getattr(theirs, name)} where {our_id} is ours", folder)


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """No bars, reports or warnings of transformers on the screen of somebody who did not call it."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _bug(what: str, where: Path) -> UserError:
    return UserError(ExitCode.BUG, f"the export is wrong: {what}", where, "nothing was published; please report this")
