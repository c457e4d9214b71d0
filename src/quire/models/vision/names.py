"""Where a checkpoint keeps the parts of a model that reads images."""

from quire.errors import CheckpointError
from quire.models.builder import Builder


def find_scope(build: Builder, names: tuple[str, ...], tensor: str) -> Builder:
    """The scope of `names` that holds `tensor`. Checkpoints of one family use several, of different years.

    Raises `CheckpointError` if none does.
    """
    for name in names:
        scope = build.scope(name)
        if scope.weights.has(tensor):
            return scope
    tried = ", ".join(f"{name}.{tensor}" for name in names)
    raise CheckpointError(f"the checkpoint holds no image encoder: it has none of {tried}")
