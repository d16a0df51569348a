"""Check every attention kernel that runs here against float64, with the dropout mask that the kernel itself used.

Dimension key: B rows, T queries, S keys, H heads, K head size.
"""

import math
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_flax.config.model import ModelConfig, ModelOptions
from gpt2_flax.doctor.rates import compute_dtype
from gpt2_flax.doctor.report import Report
from gpt2_flax.errors import UserError
from gpt2_flax.model.attention import Kernel, causal_attention
from gpt2_flax.model.attention_choice import choose_attention
from gpt2_flax.parallel.mesh import platform

_B, _T, _H, _K = 2, 256, 2, 64
_ROW = ModelOptions().n_positions  # row length, in tokens, of the default recipe
_RATE = 0.1  # dropout of attention weights
_LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
"""The largest relative error, a quotient of norms. bfloat16 has 8 bits: 4e-3 to 1e-2 are usual."""
_LETTERS = ("out", "dq", "dk", "dv")


class Case(NamedTuple):
    """A kernel, and whether rows have several documents and weights have dropout."""

    kernel: Kernel
    documents: bool
    dropout: bool

    def __str__(self) -> str:
        return f"{self.kernel}{' documents' * self.documents}{' dropout' * self.dropout}"


def attention(report: Report) -> None:
    """Report the errors of each kernel, forward and backward, with and without documents and dropout."""
    dtype = compute_dtype()
    kernel, why = choose_attention(_config("auto", True), _ROW, dropout=True, documents=True, platform=platform())
    report.line("chosen", f"{kernel}: {why}", kernel=kernel)
    cases = []
    for documents, dropout in ((True, True), (True, False), (False, True), (False, False)):
        for kernel in get_args(Kernel):
            try:
                choose_attention(_config(kernel, dropout), _T, dropout=True, documents=documents, platform=platform())
            except UserError as error:
                if not documents and not dropout:
                    report.line(kernel, f"not here: {error.what.partition(' but ')[2]}", runs=False)
                continue
            cases.append(Case(kernel, documents, dropout))
    for case in report.affordable((str(case), case) for case in cases):
        try:
            errors, dropped = examine(case, dtype)
        except Exception as error:  # compilers and drivers raise any class, and other kernels may work
            reason = " ".join(str(error).split())[:300]
            report.line(str(case), f"fails: {type(error).__name__}: {reason}", error=reason)
            report.wrong(f"attention kernel {case.kernel} fails: set model.attention to another one, and report this")
            continue
        text = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
        text += "" if dropped is None else f", {dropped:.2%} dropped"
        report.line(str(case), f"{dtype} errors {text}", errors=errors, dropped=dropped)
        if not all(error <= _LIMITS[dtype] for error in errors.values()):
            report.wrong(
                f"attention kernel {case.kernel} computes wrong numbers ({case}): "
                "set model.attention to another one, and report this"
            )
        elif dropped is not None and abs(dropped - _RATE) > 0.01:  # ten times the deviation of chance
            report.wrong(f"attention kernel {case.kernel} drops {dropped:.1%} of the weights instead of {_RATE:.0%}")


def examine(case: Case, dtype: str) -> tuple[dict[str, float], float | None]:
    """Return the relative errors of the output and its three gradients, and the share of dropped weights, if any."""
    generator = np.random.default_rng(0)
    arrays = [jnp.asarray(generator.normal(size=(_B, _T, _H, _K)), dtype) for _ in range(4)]
    host_segments_BT = _segments() if case.documents else None
    segments_BT = None if host_segments_BT is None else jnp.asarray(host_segments_BT)
    rate, key = (_RATE, jax.random.key(1)) if case.dropout else (0.0, None)

    def attend(q_BTHK, k_BTHK, v_BTHK):
        return causal_attention(case.kernel, jnp.stack([q_BTHK, k_BTHK, v_BTHK], 2), segments_BT, rate, key)

    @jax.jit
    def both_ways(q_BTHK, k_BTHK, v_BTHK, d_out_BTHK):
        out_BTHK, backward = jax.vjp(attend, q_BTHK, k_BTHK, v_BTHK)
        return out_BTHK, *backward(d_out_BTHK)

    seen_BTS = visible(host_segments_BT)
    kept_BHTS, dropped = None, None
    if case.dropout:
        kept_BHTS = kept_weights(jax.jit(attend), dtype)
        seen_BHTS = np.broadcast_to(seen_BTS[:, None], kept_BHTS.shape)
        dropped = float(1 - kept_BHTS[seen_BHTS].mean())
    q_BTHK, k_BTHK, v_BTHK, d_out_BTHK = (np.asarray(array, np.float64) for array in arrays)
    expected = reference(q_BTHK, k_BTHK, v_BTHK, d_out_BTHK, seen_BTS, kept_BHTS, rate)
    results = (np.asarray(array, np.float64) for array in both_ways(*arrays))
    norm = np.linalg.norm
    errors = [float(norm(result - exact) / norm(exact)) for result, exact in zip(results, expected, strict=True)]
    return dict(zip(_LETTERS, errors, strict=True)), dropped


def kept_weights(attend: Any, dtype: str) -> np.ndarray:
    """Return which weights a kernel does not drop, bool (B, H, T, S); weights of invisible keys are False.

    If queries and keys are zero, all weights of a query are equal. If each dimension of the values is one for a single
    key, the output is the weights themselves, for as many keys at a time as the head size.
    """
    zeros_BTHK = jnp.zeros((_B, _T, _H, _K), dtype)
    identity_SS = np.eye(_T)
    weights = []
    for first in range(0, _T, _K):
        v_SK = identity_SS[:, first : first + _K]
        v_BTHK = jnp.asarray(np.broadcast_to(v_SK[None, :, None], zeros_BTHK.shape), dtype)
        weights.append(np.asarray(attend(zeros_BTHK, zeros_BTHK, v_BTHK), np.float64))
    return np.concatenate(weights, -1).swapaxes(1, 2) > 0


def reference(
    q_BTHK: np.ndarray,
    k_BTHK: np.ndarray,
    v_BTHK: np.ndarray,
    d_out_BTHK: np.ndarray,
    seen_BTS: np.ndarray,
    kept_BHTS: np.ndarray | None = None,
    rate: float = 0.0,
) -> tuple[np.ndarray, ...]:
    """Compute attention and the gradients of its queries, keys and values in float64.

    Args:
        q_BTHK, k_BTHK, v_BTHK: queries, keys and values.
        d_out_BTHK: gradient of the output.
        seen_BTS: which keys a query sees.
        kept_BHTS: which weights dropout keeps; None: all.
        rate: dropout rate.

    Returns:
        The output and three gradients, each (B, T, H, K).
    """
    scale = 1 / math.sqrt(q_BTHK.shape[-1])
    scores_BHTS = np.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) * scale
    scores_BHTS = np.where(seen_BTS[:, None], scores_BHTS, -np.inf)
    weights_BHTS = np.exp(scores_BHTS - scores_BHTS.max(-1, keepdims=True))
    weights_BHTS /= weights_BHTS.sum(-1, keepdims=True)
    factor_BHTS = 1.0 if kept_BHTS is None else kept_BHTS / (1 - rate)
    out_BTHK = np.einsum("bhts,bshk->bthk", weights_BHTS * factor_BHTS, v_BTHK)
    d_weights_BHTS = np.einsum("bthk,bshk->bhts", d_out_BTHK, v_BTHK) * factor_BHTS
    means_BHT1 = (d_weights_BHTS * weights_BHTS).sum(-1, keepdims=True)
    d_scores_BHTS = weights_BHTS * (d_weights_BHTS - means_BHT1) * scale
    return (
        out_BTHK,
        np.einsum("bhts,bshk->bthk", d_scores_BHTS, k_BTHK),
        np.einsum("bhts,bthk->bshk", d_scores_BHTS, q_BTHK),
        np.einsum("bhts,bthk->bshk", weights_BHTS * factor_BHTS, d_out_BTHK),
    )


def visible(segments_BT: np.ndarray | None) -> np.ndarray:
    """Return which keys a query sees, bool (B, T, S): past keys of its own document."""
    causal_TS = np.tril(np.ones((_T, _T), bool))
    if segments_BT is None:
        return np.broadcast_to(causal_TS, (_B, _T, _T))
    return causal_TS & (segments_BT[:, :, None] == segments_BT[:, None])


def _segments() -> np.ndarray:
    """Return the segments of documents of 1 to 200 tokens, and padding, int32 (B, T)."""
    lengths = ((1, 2, 61, 64, 1, 100, 20), (3, 200, 53))
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return np.stack([np.pad(row, (0, _T - len(row))) for row in rows]).astype(np.int32)


def _config(kernel: str, dropout: bool) -> ModelConfig:
    sizes = {"vocab_size": 64, "n_positions": _T, "n_layer": 1, "n_head": _H, "n_embd": _H * _K}
    how = {"attention": kernel, "dtype": compute_dtype(), "attn_pdrop": _RATE if dropout else 0.0}
    return ModelConfig.model_validate(sizes | how)
