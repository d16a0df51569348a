"""What an error of a training run says in addition: its stage, where the run resumes, and how to save memory."""

import contextlib
from collections.abc import Iterator

from jax.sharding import Mesh

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config.schema import Config
from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.memory import out_of_memory
from gpt2_flax.parallel.device_batches import row_shards


@contextlib.contextmanager
def naming_stage(name: str) -> Iterator[None]:
    """Put `name`, such as "stage 1 of 2: ", before the sentence of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise type(error)(error.exit_code, name + error.what, error.where, error.fix) from error


@contextlib.contextmanager
def naming_checkpoint(run: RunFolder) -> Iterator[None]:
    """Turn an error of the disk into a `UserError` (IO) that names the step from which the run resumes."""
    try:
        yield
    except (OSError, UserError) as error:
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            error = io_error(error, error.filename or run.path)
        if not isinstance(error, UserError) or error.exit_code != ExitCode.IO:
            raise
        step = run.last_checkpoint()
        resumes = "it starts from its beginning" if step is None else f"it resumes from step {step}"
        raise UserError(error.exit_code, error.what, error.where, f"{error.fix}: {resumes}") from error


@contextlib.contextmanager
def naming_savings(config: Config, mesh: Mesh) -> Iterator[None]:
    """Turn an out-of-memory error into a `UserError` with the cheapest changes of the config that save memory."""
    try:
        yield
    except Exception as error:
        rows, microbatches, changes = config.data.global_batch_size, config.training.accumulation_steps, []
        if config.model.remat != "full":
            changes.append("model.remat=full")
        if rows % (2 * microbatches * row_shards(mesh)) == 0:
            changes.append(f"training.accumulation_steps={2 * microbatches}")
        if mesh.shape["fsdp"] * mesh.shape["tensor"] < mesh.size:
            changes.append(f"mesh.fsdp={mesh.size // mesh.shape['tensor']}")
        changes.append(f"data.global_batch_size below {rows}")
        fix = f"add these, one after another until it fits: {', '.join(changes)}"
        failure = out_of_memory(error, config.output, fix)
        if failure is None:
            raise
        raise failure from error
