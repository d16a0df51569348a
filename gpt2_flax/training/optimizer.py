"""The learning rate over a run, and AdamW (Loshchilov and Hutter, arXiv:1711.05101) around it."""

from typing import Any

import jax
import optax

from gpt2_flax.config import Config
from gpt2_flax.parallel.rules import path_of


def learning_rate(config: Config) -> optax.Schedule:
    """Returns the learning rate of each optimizer step: a rise from 0, then the decay that the config names.

    The first step has rate 0 when there is warm-up; the last of `training.total_steps` has almost the lowest.
    """
    optimizer, warmup = config.optimizer, config.warmup_steps
    peak, steps = optimizer.learning_rate, max(1, config.training.total_steps - config.warmup_steps)
    decay = {
        "linear": lambda: optax.linear_schedule(peak, peak * optimizer.min_learning_rate_ratio, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, optimizer.min_learning_rate_ratio),
        "constant": lambda: optax.constant_schedule(peak),
    }[optimizer.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup]) if warmup else decay


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns clipping by global norm and AdamW with decay of matrices only."""
    optimizer = config.optimizer
    adamw = optax.adamw(
        learning_rate(config),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=_is_matrix,
    )
    clip = optax.clip_by_global_norm(optimizer.max_grad_norm) if optimizer.max_grad_norm else optax.identity()
    return optax.chain(clip, adamw)


def _is_matrix(params: Any) -> Any:
    # By name, not by rank: a stacked bias has two dimensions or more.
    return jax.tree_util.tree_map_with_path(lambda key_path, _: path_of(key_path).endswith("/kernel"), params)
