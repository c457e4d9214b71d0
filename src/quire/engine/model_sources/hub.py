"""Downloads models from the Hugging Face hub into its own cache, checks what arrived, and explains failures.

The hub's library resumes, downloads in parallel and shows progress. Its settings (HF_ENDPOINT, HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE) and the proxy variables hold.
"""

import hashlib
import os
import re
from pathlib import Path

from quire.engine.model_sources.names import HubName
from quire.errors import CheckpointError

FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "LICENSE*"),
    *("*.model", "*.tiktoken", "merges.txt", "vocab.txt"),
    *("[0-9]_*/config.json", "[0-9]_*/model.safetensors"),
)
"""Patterns of the files that Quire reads: at the top of a repository, and in folders of modules."""
UNREAD_FILES = ("[!0-9]*/*", "[0-9][!_]*/*", "consolidated*")
"""Copies for other programs: exports in folders, and the weights in their maker's own format."""
WEIGHT_FILES = ("*.safetensors", "*/*.safetensors")
_CHUNK = 1 << 20
_SHA256_DIGITS, _GIT_DIGITS = 64, 40


def cache_folder() -> Path:
    """The folder of the hub's cache. Raises `CheckpointError` if there is none."""
    from huggingface_hub import constants

    try:
        return Path(constants.HF_HUB_CACHE).expanduser()
    except RuntimeError:
        raise CheckpointError("there is no home folder to keep models in; set HOME, or HF_HOME to a folder") from None


def download(name: HubName, *, check_all: bool = False, weights: bool = True) -> Path:
    """The folder of one commit of a repository. Files in the cache are not downloaded again.

    The revision is resolved to a commit, from which all files come. Without `weights`, safetensors are left out. If
    anything was downloaded, or with `check_all`, the checksums of all files are compared. Raises `CheckpointError`, in
    one line, for what cannot be had.
    """
    from huggingface_hub import constants, snapshot_download  # only hub models need it
    from huggingface_hub.file_download import repo_folder_name

    blobs = cache_folder() / repo_folder_name(repo_id=name.repository, repo_type="model") / "blobs"
    before = _file_names(blobs)
    try:
        # Without a connection it returns the earlier download of that revision.
        found = snapshot_download(
            name.repository,
            revision=name.revision,
            allow_patterns=_patterns(name),
            ignore_patterns=[*UNREAD_FILES, *([] if weights else WEIGHT_FILES)],
        )
    except Exception as error:  # network libraries raise many classes of their own
        raise CheckpointError(explain(error, name)) from error
    folder = Path(found)
    if name.file is not None and not (folder / name.file).is_file():
        raise CheckpointError(
            f"{name.repository} has no file {name.file} in its revision {name.revision or 'main'}; see "
            f"{constants.ENDPOINT}/{name.repository}/tree/{name.revision or 'main'} for those there are"
        )
    if check_all or _file_names(blobs) - before:
        check_files(folder, name)
    return folder


def _patterns(name: HubName) -> list[str]:
    """The files to download. A GGUF model comes alone, with all its parts."""
    if name.file is None:
        return list(FILES)
    return [re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-*\1", name.file, flags=re.IGNORECASE)]


def check_files(folder: Path, name: HubName) -> None:
    """Compare each file's content with its checksum. A damaged file is removed and raises `CheckpointError`."""
    damaged = [path for path in sorted(folder.iterdir()) if path.is_symlink() and not _is_intact(path)]
    for path in damaged:
        blob, content = path.parent / os.readlink(path), path.resolve()
        for each in (path, blob, content):
            each.unlink(missing_ok=True)
    if damaged:
        raise CheckpointError(
            f"{name}: {', '.join(path.name for path in damaged)} arrived damaged, with another checksum than the hub "
            f"names, and was removed; run quire pull {name} again, and if it happens again check the proxy or mirror"
        )


def _is_intact(link: Path) -> bool:
    """Whether a file has the checksum that names its blob: SHA-256, or git's SHA-1 for small files."""
    expected = Path(os.readlink(link)).name
    if len(expected) == _SHA256_DIGITS:
        digest = hashlib.sha256()
    elif len(expected) == _GIT_DIGITS:
        digest = hashlib.sha1(b"blob %d\0" % link.stat().st_size, usedforsecurity=False)
    else:
        return True  # a mirror with names of its own
    with link.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == expected


def _file_names(folder: Path) -> set[str]:
    return set(os.listdir(folder)) if folder.is_dir() else set()


# -- failures ----------------------------------------------------------------------------------------------------------


def explain(error: Exception, name: HubName) -> str:
    """One line: what was asked, what happened, what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, GatedRepoError):
        return (
            f"{name} is gated: {hub} gives it only to accounts that accepted its terms; accept them on "
            f"{hub}/{name.repository}, then run hf auth login or set HF_TOKEN"
        )
    if isinstance(cause, RevisionNotFoundError):
        return f"{name.repository} has no revision {name.revision or 'main'} on {hub}; give a branch, tag or commit"
    if isinstance(cause, RepositoryNotFoundError | HFValidationError):
        return (
            f"{name.repository} is neither a folder here nor a model on the hub, {hub}; check the name, and for a "
            "private model run hf auth login or set HF_TOKEN"
        )
    if isinstance(status, int):
        return f"{name} could not be downloaded: {hub} answered {status}; {_advice(status)}"
    return _explain_connection(error, cause, name, hub)


def _explain_connection(error: Exception, cause: BaseException | None, name: HubName, hub: str) -> str:
    """Failures without an answer of the hub. Classes are known by name: the HTTP library differs between versions of
    the hub's."""
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    kinds = {kind.__name__ for kind in type(cause).__mro__}
    missing = "only a part of it was" if isinstance(error, IncompleteSnapshotError) else "nothing was"
    if "OfflineModeIsEnabled" in kinds or (cause is None and isinstance(error, LocalEntryNotFoundError)):
        return (
            f"{name} is no folder here, and {missing} downloaded before; HF_HUB_OFFLINE forbids to ask "
            f"{hub}: unset it, or run quire pull {name} where there is a connection and copy its {cache_folder()} here"
        )
    if "ProxyError" in kinds:
        return f"{name}: the proxy did not lead to {hub}: {_first_line(cause)}; check HTTPS_PROXY, HTTP_PROXY, NO_PROXY"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            f"{name} is no folder here, the hub cannot be reached at {hub}, and {missing} downloaded before; check the "
            "connection and HTTPS_PROXY, set HF_ENDPOINT to a mirror, or give the folder of a checkpoint"
        )
    is_local = isinstance(cause, OSError) and cause.errno is not None  # no space, no permission
    advice = f"check the disk of {cache_folder()}" if is_local else f"run quire pull {name} again, it goes on"
    return f"{name} could not be downloaded from {hub}: {_first_line(cause)}; {advice}"


def _advice(status: int) -> str:
    match status:
        case 401:
            return "run hf auth login, or set HF_TOKEN to a token that is valid"
        case 403:
            return "the account or the token lacks permission to read this model; set HF_TOKEN to a token that has it"
        case 429:
            return "it limits requests; wait some minutes, or set HF_TOKEN, with which it allows more"
        case _ if status >= 500:
            return "try again later, or set HF_ENDPOINT to a mirror"
        case _:
            return "check the name, and HF_ENDPOINT if it names a mirror"


def _first_line(error: BaseException | None) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
