"""What a file, a folder or a name holds, without building a model."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from perception.checkpoint import CONFIG, open_checkpoint, read_config
from perception.errors import CheckpointError, ConfigError
from perception_encoder.checkpoints import LAYOUTS, FolderConfig, Kind, infer_config
from perception_encoder.zoo import describe, download, is_known, other_kind


def inspect(source: str | Path) -> dict[str, Any]:
    """The layout, the sizes and every tensor of some weights, as plain values. Only the header and shapes are read.

    Raises what `download` and `open_checkpoint` raise.
    """
    path = download(str(source))
    checkpoint = open_checkpoint(path)
    tensors = [(name, checkpoint[name]) for name in checkpoint]
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for _, t in tensors)
    layout = layout_of(checkpoint)
    try:
        config: Any = infer_config(checkpoint, layout[1]).to_dict() if layout else None
    except (CheckpointError, ConfigError):
        config = None  # an unpublished size: shapes alone do not say how many heads there are
    return {
        "path": str(path),
        "bytes": sum(t.numel() * t.element_size() for _, t in tensors),
        "layout": layout[0] if layout else "unknown",
        "kind": layout[1] if layout else None,
        "parameters": sum(t.numel() for _, t in tensors),
        "dtypes": dict(dtypes),
        "config": read_config(path) if path.is_dir() and (path / CONFIG).is_file() else config,
        "tensors": [
            {"name": name, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in tensors
        ],
    }


def layout_of(names: Any) -> tuple[str, Kind] | None:
    """The layout whose sign is among the names, and what it holds."""
    kinds: tuple[Kind, ...] = ("clip", "tower")
    return next(((layout.name, kind) for kind in kinds for layout in LAYOUTS[kind] if layout.sign in names), None)


def kind_of(source: str, revision: str | None = None) -> Kind:
    """Whether a name, folder or file is a CLIP model or a vision tower alone. Raises CheckpointError when neither.

    revision  a branch, tag or commit of the hub repository
    """
    if is_known(source):
        return describe(source)["kind"]
    if not os.path.exists(source):  # noqa: PTH110  a name may be too long for a Path
        if source.startswith(("timm/", "open_clip/")):
            return "clip" if source.startswith("open_clip/") else "tower"
        if error := other_kind(source):
            raise error
    path = download(source, revision=revision)
    if path.is_dir():
        return FolderConfig.from_dict(read_config(path), path / CONFIG).kind
    found = layout_of(open_checkpoint(path))
    if found is None:
        raise CheckpointError(f"{path} has no layout known here; `perception inspect {path}` lists its tensors")
    return found[1]
