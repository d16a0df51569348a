"""Read an exported folder with `transformers` and compare it with our model.

torch and transformers are imported inside functions; without them there is no verification. One model at a time is in
memory beside the weights, in float32 for every dtype of the files.

Dimension key: B rows, T tokens of a row, V vocabulary.
"""

import contextlib
import ctypes
import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_flax.checkpoint.tensor_files import INDEX, TORCH_WEIGHTS, WEIGHTS
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.export.weight_files import Dtype, numpy_dtype
from gpt2_flax.tokenizers.tokenizer import Tokenizer
from gpt2_flax.tokenizers.transformers_check import ODD_TEXTS, differing_texts, too_many

NOT_VERIFIED = "not verified, torch and transformers are not installed: pip install 'gpt2_flax[export]'"

_ROWS, _LENGTH, _PROMPT_TOKENS, _NEW_TOKENS = 2, 64, 8, 16


@dataclass(frozen=True)
class Verification:
    """The amount of what was compared, and the largest difference between two logits."""

    max_logit_difference: float
    max_logit: float
    tokens: int
    texts: int
    tied_texts: int  # texts for which SentencePiece found two segmentations equally good and took the other one
    new_tokens: int
    files: tuple[str, ...]
    transformers_version: str
    dtype: Dtype = "float32"
    rounding: float = 0.0  # the largest change of a logit by rounding the weights to `dtype`

    def __str__(self) -> str:
        ties = f" but for {self.tied_texts} with ties" if self.tied_texts else ""
        text = (
            f"logits of {self.tokens} tokens equal those of transformers {self.transformers_version} within "
            f"{self.max_logit_difference:.1e}, token ids of {self.texts} texts are the same{ties}, and so are "
            f"{self.new_tokens} tokens generated greedily"
        )
        if self.dtype == "float32":
            return text
        rounding = (
            f"rounding the weights to {self.dtype}, before all this, changed logits by at most {self.rounding:.1e}"
        )
        return f"{text}; {rounding}"


class _Ours(NamedTuple):
    tokens_BT: np.ndarray
    logits_BTV: np.ndarray
    prompts: list[list[int]]
    continuations: list[list[int]]
    leads: list[list[float]]  # the logit of each new token minus the next best logit
    rounding: float


def verify_folder(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: Dtype = "float32",
    samples: Sequence[str] = (),
) -> Verification | None:
    """Return how the results of `transformers` from `folder` differ from our results from `weights`.

    Our weights are rounded to `dtype`; both sides compute in float32. Token ids are compared on `samples` too.

    Returns:
        None if torch or transformers is not installed: the caller should print `NOT_VERIFIED`.

    Raises:
        UserError: BUG if tensors are missing or surplus, or logits, token ids or generated tokens differ.
    """
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError:
        return None
    ours = our_results(weights, config, tokenizer, dtype, samples)
    files = tuple(name for name in (WEIGHTS, INDEX, TORCH_WEIGHTS) if (folder / name).is_file())
    found = []
    with _quiet():
        for name in files:
            _free_memory()
            found.append(compare_model(load_model(folder, name), ours, folder / name))
        auto = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ties = compare_tokenizers(tokenizer, auto, samples, folder)
    return Verification(
        max_logit_difference=max(difference for difference, _ in found),
        max_logit=float(np.abs(ours.logits_BTV).max()),
        tokens=ours.tokens_BT.size,
        texts=len(ODD_TEXTS) + len(samples),
        tied_texts=ties,
        new_tokens=min(same for _, same in found),
        files=files,
        transformers_version=transformers.__version__,
        dtype=dtype,
        rounding=ours.rounding,
    )


def our_results(
    weights: Mapping[str, np.ndarray], config: ModelConfig, tokenizer: Tokenizer, dtype: Dtype, samples: Sequence[str]
) -> _Ours:
    import jax

    from gpt2_flax.checkpoint.weights import model_from_weights, model_logits

    shape = (_ROWS, min(_LENGTH, config.n_positions))
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    # Scanned layers compile faster, and without a copy of each layer's slice of the stacked parameters.
    config = config.model_copy(update={"dtype": "float32", "layers": "scanned"})
    leaves, structure = jax.tree.flatten(model_from_weights(config, dict(weights)))

    def logits_of(tokens_BT: np.ndarray) -> np.ndarray:
        return model_logits(jax.tree.unflatten(structure, leaves), tokens_BT)

    logits_BTV = logits_of(tokens_BT)
    rounding = 0.0
    if dtype != "float32":
        widened = jax.jit(lambda leaf: leaf.astype(np.float32))
        for index in range(len(leaves)):  # free each leaf before its rounded copy: there is no second model in memory
            leaf = np.asarray(leaves[index]).astype(numpy_dtype(dtype))
            leaves[index] = None
            leaves[index] = widened(leaf)
        exact_BTV, logits_BTV = logits_BTV, logits_of(tokens_BT)
        rounding = float(np.abs(exact_BTV - logits_BTV).max())
    prompts, continuations, leads = [], [], []
    if new := min(_NEW_TOKENS, shape[1] // 2):
        starts = samples[:_ROWS] or ODD_TEXTS[:_ROWS]
        stop = min(_PROMPT_TOKENS, shape[1] - new)  # inside the text: after its end a model has nothing to add
        prompts = [[tokenizer.bos_id, *ids.tolist()][:stop] for ids in tokenizer.encode_batch(starts)]
        continuations, leads = continue_greedily(logits_of, prompts, shape[1], new, tokenizer.eos_id)
    return _Ours(tokens_BT, logits_BTV, prompts, continuations, leads, rounding)


def continue_greedily(
    logits_of: Callable[[np.ndarray], np.ndarray], prompts: list[list[int]], length: int, new: int, eos_id: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Return the most likely next tokens of each prompt, until `eos_id`, and their leads over the next best token."""
    tokens_BT = np.zeros((len(prompts), length), np.int64)
    rows_B, ends_B = np.arange(len(prompts)), np.array([len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    chosen, leads = [], []
    for step in range(new):
        # Tokens to the right do not change a logit, so all steps share one compiled program.
        last_BV = logits_of(tokens_BT)[rows_B, ends_B - 1 + step]
        best_BN = np.partition(last_BV, -min(2, last_BV.shape[1]))[:, -2:]  # one column in a vocabulary of one token
        chosen.append(last_BV.argmax(-1))
        leads.append(best_BN[:, -1] - best_BN[:, 0])
        tokens_BT[rows_B, ends_B + step] = chosen[-1]
    continuations = np.stack(chosen, axis=1).tolist()
    ends = [ids.index(eos_id) + 1 if eos_id in ids else new for ids in continuations]
    return [ids[:end] for ids, end in zip(continuations, ends, strict=True)], np.stack(leads, axis=1).tolist()


def load_model(folder: Path, name: str) -> Any:
    import torch
    import transformers

    model_class: Any = transformers.GPT2LMHeadModel
    model, info = model_class.from_pretrained(
        folder,
        output_loading_info=True,
        local_files_only=True,
        use_safetensors=name != TORCH_WEIGHTS,
        ignore_mismatched_sizes=True,  # report them in `info` like the others, not as an exception
        dtype=torch.float32,
    )
    problems = [f"{kind} {quote(sorted(map(str, info[kind]))[:5])}" for kind in info if info[kind]]
    if problems:
        raise _bug(f"transformers found {', '.join(problems)}", folder / name)
    return model


def compare_model(model: Any, ours: _Ours, where: Path) -> tuple[float, int]:
    """Return the largest difference between two logits, and the number of generated tokens that are the same."""
    import torch

    # The noise of float32 is relative: 5e-6 where logits are below 10, above 1e-4 where they are near 100.
    limit = 1e-5 * max(10.0, float(np.abs(ours.logits_BTV).max()))
    same = 0
    tokens_BT = torch.from_numpy(ours.tokens_BT)
    with torch.inference_mode():
        # Twice: MKL may compute some of the first tanh of a process in low precision, if threads compete
        # (github.com/pytorch/pytorch/issues/188792).
        model(tokens_BT)
        theirs_BTV = model(tokens_BT).logits.float().numpy()
        difference = float(np.abs(ours.logits_BTV - theirs_BTV).max())
        if not difference <= limit < math.inf:  # NaN fails too
            raise _bug(f"logits differ by {difference:.1e} where {limit:.1e} is allowed", where)
        for prompt, expected, leads in zip(ours.prompts, ours.continuations, ours.leads, strict=True):
            inputs = torch.tensor([prompt])
            new = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=len(leads), do_sample=False
            )[0, len(prompt) :].tolist()
            differing = [at for at, token in enumerate(expected) if new[at : at + 1] != [token]]
            # Either of two equally likely tokens may come first, and a different text follows it.
            if differing and leads[differing[0]] > 2 * limit:
                raise _bug(f"greedy continuation {new} where {expected} is ours", where)
            same += differing[0] if differing else len(expected)
    return difference, same


def compare_tokenizers(ours: Tokenizer, theirs: Any, samples: Sequence[str], folder: Path) -> int:
    """Return the number of samples in which ties were broken differently."""

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    different = differing_texts(ours, encode, samples)
    if too_many(ours, different, samples):
        raise _bug(f"AutoTokenizer gives other ids for {quote(different[0])}", folder)
    special = {"bos_token_id": ours.bos_id, "eos_token_id": ours.eos_id, "pad_token_id": ours.pad_id}
    for name, our_id in special.items():
        if our_id is not None and getattr(theirs, name) != our_id:
            raise _bug(f"AutoTokenizer has {name} {getattr(theirs, name)} where {our_id} is ours", folder)
    return len(different)


def _free_memory() -> None:
    """Free models in reference cycles, and return to the system the memory that allocators keep for each thread."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars, reports and warnings of transformers in the block."""
    from transformers.utils import logging

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
