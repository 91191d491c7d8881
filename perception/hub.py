"""A reference to weights becomes a path on this machine: a local file or folder, or a download from the model hub."""

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perception.checkpoint import CONFIG, INDEX, TORCH_SUFFIXES, WEIGHTS, inside
from perception.errors import CheckpointError, ConfigError
from perception.files import sha256_of

# What a snapshot of a whole repository fetches: configs, tokenizers and safetensors, never a pickle.
SNAPSHOT = ("*.json", "*.safetensors", "tokenizer.model", "*.tiktoken")
# The models of `config.json` that are read with a tokenizer of their own, and the files it can be.
LANGUAGE = ("perception_lm", "llama")
WORDS = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "original/tokenizer.model")
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REVISION = r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]*[A-Za-z0-9_])?"


@dataclass(frozen=True)
class HubId:
    """`owner/name`, with the revision and the file where they were given."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{self.repo}"


def parse_hub_id(text: str) -> HubId:
    """`[hf://]owner/name[@revision][:file]`. Raises ConfigError for anything else, without a look at the disk."""
    body, _, file = text.removeprefix("hf://").partition(":")
    repo, _, revision = body.partition("@")
    wrong = (
        not re.fullmatch(f"{_PART}/{_PART}", repo)
        or len(repo) > 96
        or any(bad in repo for bad in ("--", ".."))
        or (revision and (not re.fullmatch(_REVISION, revision) or ".." in revision or len(revision) > 255))
        or (file and (not _is_plain(file) or len(file) > 255))
    )
    if wrong or text.endswith(("@", ":")):
        shown = repr(text if len(text) <= 80 else f"{text[:77]}...")
        raise ConfigError(f"{shown} is no file, no folder and no hub id; a hub id is owner/name[@revision][:file]")
    return HubId(repo, revision or None, file or None)


def locate(
    reference: str | Path,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    sha256: str | None = None,
    filename: str | Sequence[str] | None = None,
) -> Path:
    """The local path of what `reference` names, downloaded into the hub's cache when it is not here.

    reference  a file, a folder, `owner/name` or `hf://owner/name`, both with `@revision` and `:file` if wanted. What
               exists here wins over a hub id; `hf://` never looks here
    revision   branch, tag or commit; what the reference says wins
    offline    True: only what is here. None: as the environment variable HF_HUB_OFFLINE says
    sha256     what the file must hash to. A cached file that does not is fetched again
    filename   a file of the repository or folder; of several, the first that is there. Without one, a hub id gives the
               folder of a snapshot (configs and safetensors, no pickles)

    Raises ConfigError for what is neither path nor hub id, CheckpointError for what cannot be had.
    """
    names = (filename,) if isinstance(filename, str) else tuple(filename or ())
    found = _local(reference)
    if found is None:
        hub_id = parse_hub_id(str(reference))
        names = (hub_id.file,) if hub_id.file else names
        if revision and not hub_id.revision:
            hub_id = parse_hub_id(f"{hub_id.repo}@{revision}")
        return _from_hub(hub_id, names, is_offline() if offline is None else offline, sha256)
    if found.is_dir() and names:
        found = next((inside(found, name) for name in names if (found / name).is_file()), found / names[0])
    if names and not found.is_file():
        raise CheckpointError(f"no file {found}")
    if sha256 and sha256_of(found) != sha256:
        raise CheckpointError(f"{found} has another sha256 than expected: {sha256_of(found)}, not {sha256}")
    return found


def is_offline() -> bool:
    """What HF_HUB_OFFLINE says."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE")


def _local(reference: str | Path) -> Path | None:
    """The path, when the reference is one; None when it can only be a hub id."""
    text = str(reference)
    if text.startswith("hf://"):
        return None
    if not text or "\0" in text or any(len(part) > 255 for part in text.split("/")) or len(text) > 4096:
        raise ConfigError(
            f"{text[:80]!r} is no path and no hub id: it is empty, or has a NUL byte or a name longer than 255"
        )
    path = Path(text).expanduser()
    if path.exists():
        return path
    suffixes = (".safetensors", ".json", *TORCH_SUFFIXES)
    if isinstance(reference, Path) or path.is_absolute() or text.startswith(("./", "~")) or text.endswith(suffixes):
        raise CheckpointError(f"no file or folder at {path}")
    return None


def _is_plain(file: str) -> bool:
    parts = file.split("/")
    return not any(c in file for c in "\0\\:") and all(part not in ("", ".", "..") for part in parts)


def _from_hub(hub_id: HubId, names: Sequence[str], offline: bool, sha256: str | None) -> Path:
    """The cache first: published weights do not change, so what is here is used without asking the hub."""
    for name in names:
        if not _is_plain(name):
            raise ConfigError(f"{name!r} is no file name in a repository")
    try:
        path = _cached(hub_id, names)
        if path is None and offline:
            raise CheckpointError(_not_here(hub_id, names, "the hub is off (HF_HUB_OFFLINE or offline=True)"))
        if path is None:
            path = _fetch(hub_id, names)
        elif not names and not offline and _lacks_words(path):
            _fill_in(hub_id, path)
        if sha256 and (found := sha256_of(path)) != sha256:
            if offline:
                raise CheckpointError(f"{path} has sha256 {found}, published is {sha256}; fetch it again online")
            path = _fetch(hub_id, [path.name], force_download=True)
            if (found := sha256_of(path)) != sha256:
                raise CheckpointError(f"{hub_id.repo}:{path.name} has sha256 {found}, published is {sha256}; not used")
        return path
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client, its HTTP library and the disk each have their own
        raise CheckpointError(_explain(error, hub_id, names)) from error


def _cached(hub_id: HubId, names: Sequence[str]) -> Path | None:
    """What the cache holds of it. The client's `local_files_only` is not used: even so it may call home."""
    from huggingface_hub import try_to_load_from_cache

    for name in names or (CONFIG,):
        path = try_to_load_from_cache(hub_id.repo, name, revision=hub_id.revision)
        if isinstance(path, str):
            if names:
                return Path(path)
            return Path(path).parent if _is_whole(Path(path).parent) else None
    return None


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has all of its weights, and not only the files somebody once asked for."""
    if (folder / INDEX).exists():
        shards = json.loads((folder / INDEX).read_bytes()).get("weight_map", {}).values()
        return all((folder / str(shard)).exists() for shard in shards)
    return (folder / WEIGHTS).exists()


def _lacks_words(folder: Path) -> bool:
    """Whether a snapshot is a language model without its tokenizer; an encoder's has none, or brings its own."""
    try:
        data = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):  # for the reader of the config to refuse
        return False
    language = isinstance(data, dict) and data.get("model_type") in LANGUAGE
    return language and not any(found for pattern in WORDS for found in folder.glob(pattern))


def _fill_in(hub_id: HubId, folder: Path) -> None:
    """Fetch the small files a cached snapshot lacks, of its own commit, so that they belong to its weights."""
    import huggingface_hub

    small = [pattern for pattern in SNAPSHOT if not pattern.endswith(".safetensors")]
    with suppress(Exception):  # the weights are here: without a hub it is as it was, and a tokenizer may be given
        huggingface_hub.snapshot_download(repo_id=hub_id.repo, revision=folder.name, allow_patterns=small)


def _fetch(hub_id: HubId, names: Sequence[str], **options: Any) -> Path:
    """Download the first of the named files that is there, or a snapshot's folder when none is named."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    options.update(repo_id=hub_id.repo, revision=hub_id.revision)
    if not names:
        return Path(huggingface_hub.snapshot_download(**options, allow_patterns=list(SNAPSHOT)))
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(**options, filename=name))
        except EntryNotFoundError as error:
            # An unreachable hub says nothing about which files there are: only a real absence tries the next name.
            if name == names[-1] or isinstance(error, LocalEntryNotFoundError):
                raise
    raise LookupError(names)  # not reached: the last name returns or raises


def _wanted(hub_id: HubId, names: Sequence[str] = ()) -> str:
    what = f"{hub_id.repo}{'@' + hub_id.revision if hub_id.revision else ''}"
    return f"{what}:{' or '.join(names)}" if names else what


def _not_here(hub_id: HubId, names: Sequence[str], why: str) -> str:
    from huggingface_hub import constants

    hint = f"`perception download {hub_id.repo}` fetches it where there is a network"
    return f"{_wanted(hub_id, names)} is not in the cache {constants.HF_HUB_CACHE}, and {why}; {hint}"


def _explain(error: Exception, hub_id: HubId, names: Sequence[str]) -> str:
    from huggingface_hub import constants, errors

    cache, what, wanted = constants.HF_HUB_CACHE, _wanted(hub_id), _wanted(hub_id, names)
    if isinstance(error, errors.GatedRepoError):
        return f"{what} is gated: accept its terms at {hub_id.url}, then run `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no repository {what}, or it is private: look at {hub_id.url}, then run `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{hub_id.repo} has no revision {hub_id.revision!r}; see {hub_id.url}/tree/main"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _not_here(hub_id, names, "HF_HUB_OFFLINE is set")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _not_here(hub_id, names, "the hub cannot be reached")
    if isinstance(error, errors.EntryNotFoundError):
        return f"{what} has no file {' or '.join(names)}; see {hub_id.url}/tree/{hub_id.revision or 'main'}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{wanted} cannot be written to the cache {cache}: {error}; free space, or set HF_HOME to another disk"
    return f"{wanted} could not be downloaded to {cache}: {type(error).__name__}: {error}"
