"""`quire rm`: remove kept models."""

from quire.engine.memory_sizes import show_bytes
from quire.engine.model_sources.names import parse_name
from quire.engine.model_sources.store import remove_stored


def rm(model: str, *more: str) -> None:
    """Remove models from this machine. The hub's cache is shared: other programs lose them too.

    Parameters
    ----------
    model
        A name as quire list shows it. Without a revision or version all of a model's are removed; org/name@revision
        takes a branch, a tag, a commit or its first 7 characters.
    more
        Further names.
    """
    for name in [parse_name(each) for each in (model, *more)]:
        for removed in remove_stored(name):
            print(f"removed {removed.name} {removed.revision[:12]}, {show_bytes(removed.size)}")
