"""The command line: one small function a subcommand. What needs jax is imported inside it, so that help is instant."""

from gpt2_flax.cli import text, models, generation, exchange  # noqa: F401, I001  these define the commands, in this order
from gpt2_flax.cli.app import DEBUG, app

__all__ = ["DEBUG", "app"]
