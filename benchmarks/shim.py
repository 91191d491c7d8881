"""What other libraries need in order to be imported here; imports nothing of ours, for it is timed with them."""

from importlib.metadata import PackageNotFoundError, version

import torch


def shim() -> None:
    """Let timm, open_clip and transformers be imported where torch is a CPU build and torchvision a CUDA build.

    torchvision then cannot load its operators; two are looked up at import and called by nothing that runs here.
    """
    try:
        torchvision = version("torchvision")
    except PackageNotFoundError:
        return
    if "+cpu" in torch.__version__ and "+cpu" not in torchvision:
        for name in ("nms", "qnms"):
            try:
                torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float t) -> Tensor")
            except RuntimeError:  # declared already
                return
