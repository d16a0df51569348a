"""The choice of mesh sizes that a config leaves open."""

from collections.abc import Iterator, Sequence

from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.parallel.devices import Device, memory_bytes
from gpt2_flax.parallel.mesh import MeshSizes

BYTES_PER_PARAMETER = 16  # float32 parameter, gradient, and two moments
_SHARE_FOR_STATE = 0.5  # of a device's memory; activations need the rest


def choose_mesh(config: ResolvedConfig, devices: Sequence[Device]) -> tuple[MeshSizes, str]:
    """Return the mesh sizes for a config, and the reason for the choice.

    Replicas of the whole model (`data`) communicate least. So parameters are sharded (`fsdp`) only as far as memory
    demands, and matrix products (`tensor`) only when there are more devices than rows. Sizes that the config gives are
    kept. If no mesh fits, returns sizes that `make_mesh` or the layout rejects with an explanation.
    """
    mesh, count, memory = config.mesh, len(devices), memory_bytes(devices[0])
    state = BYTES_PER_PARAMETER * config.model.parameters
    sizes = sorted(_sizes(config, count), key=lambda size: (size[1], size[0]))
    if not sizes:
        given = (1 if size == "auto" else size for size in (mesh.fsdp, mesh.tensor))
        return MeshSizes(mesh.data, *given), "nothing else suits the number of devices and rows"
    enough = (size for size in sizes if memory is None or state / (size[0] * size[1]) <= _SHARE_FOR_STATE * memory)
    fsdp, tensor = next(enough, max(sizes, key=lambda size: (-size[1], size[0])))
    share = f"parameters, gradients and optimizer state take {state / (fsdp * tensor) / 1e9:.2f} GB"
    reason = f"{share} of each device" + (f"'s {memory / 1e9:.0f} GB" if memory else ", whose memory is not known")
    if "auto" not in (mesh.fsdp, mesh.tensor):
        reason = f"as configured; {reason}"
    data = count // (fsdp * tensor) if mesh.data == -1 else mesh.data
    return MeshSizes(data, fsdp, tensor), reason


def _sizes(config: ResolvedConfig, count: int) -> Iterator[tuple[int, int]]:
    """Yield each (fsdp, tensor) that divides devices, rows and every array evenly and keeps the configured sizes."""
    model, mesh = config.model, config.mesh
    rows = config.data.global_batch_size // config.training.accumulation_steps
    for tensor in range(1, count + 1):
        for fsdp in range(1, count // tensor + 1):
            data = count // (fsdp * tensor)
            as_given = mesh.fsdp in ("auto", fsdp) and mesh.tensor in ("auto", tensor) and mesh.data in (-1, data)
            even = count % (fsdp * tensor) == 0 and rows % (data * fsdp) == 0
            splits = model.n_head % tensor == 0 and model.n_embd % fsdp == 0
            if as_given and even and splits and model.padded_vocab_size % (tensor * fsdp) == 0:
                yield fsdp, tensor
