"""The command line: one small function a subcommand. What needs jax is imported inside it, so that help is instant."""

from gpt2_flax.cli import models, text  # noqa: F401  these define the commands
from gpt2_flax.cli.app import DEBUG, app

__all__ = ["DEBUG", "app"]
