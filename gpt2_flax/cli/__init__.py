"""The command line: one small function for each command, which imports jax inside, so that help appears at once."""

from gpt2_flax.cli import text, models, generation, exchange  # noqa: F401, I001  these define the commands, in this order
from gpt2_flax.cli.app import DEBUG, app

__all__ = ["DEBUG", "app"]
