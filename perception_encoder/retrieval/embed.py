"""Pictures to vectors.

N pictures  C embedding width
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perception.errors import CheckpointError, ConfigError
from perception.files import atomic_write
from perception_encoder.images import Failure, pixel_batches

if TYPE_CHECKING:
    from perception_encoder.retrieval.parts import Parts


@overload
def embed(model: Any, images: Any, *, out: str | Path, **settings: Any) -> "Parts": ...
@overload
def embed(model: Any, images: Any, *, out: None = None, **settings: Any) -> Tensor: ...
def embed(model: Any, images: Any, *, out: str | Path | None = None, **settings: Any) -> Any:
    """One vector a picture, in the order given: N C float32 on the CPU; with `out`, parts on disk.

    model      a CLIP model, or an encoder: its pooled output, or the mean of its patches where it has no pool
    images     paths, a folder, bytes, PIL images, arrays, or B 3 S S prepared pixels; with `out` also tars, Parquet,
               lines of text and videos, as `retrieval.sources.as_source` says
    normalize  vectors of length 1, so that a dot product is a cosine
    on_error   "raise" (the default without `out`) names the picture; "skip" and "log" (the default with `out`) leave it
               out, and `failures`, where given, learns which
    out        a folder for parts (`retrieval.parts` has their format): the work can be killed and started again, and
               shared between processes, for which see `retrieval.pipeline.embed_parts`

    batch_size=64, progress=False and workers= (threads that read) are for both.
    """
    if out is None:
        return embed_images(model, images, **settings)
    from perception_encoder.retrieval.pipeline import embed_parts

    return embed_parts(model, images, out, **settings)


@torch.inference_mode()
def embed_images(
    model: Any,
    images: Any,
    *,
    batch_size: int = 64,
    normalize: bool = True,
    progress: bool = False,
    on_error: str = "raise",
    failures: list[Failure] | None = None,
    workers: int | None = None,
) -> Tensor:
    """`embed` into memory."""
    rows = []
    batches = pixel_batches(
        images, model.preprocess, batch_size=batch_size, on_error=on_error, workers=workers, progress=progress
    )
    for pixels, failed in batches:
        if len(pixels):
            x = embed_pixels(model, pixels).float()
            rows.append((F.normalize(x, dim=-1) if normalize else x).cpu())
        if failures is not None:
            failures += failed
    return torch.cat(rows) if rows else torch.empty(0, embedding_width(model))


def embed_pixels(model: Any, pixels: Tensor) -> Tensor:
    """B 3 S S -> B C on the model's device, not normalised."""
    first = next(model.parameters())
    pixels = pixels.to(first.device, first.dtype)
    if hasattr(model, "encode_image"):
        return model.encode_image(pixels)
    if hasattr(model, "pooled") and getattr(model, "pool", True) is not None:
        return model.pooled(pixels)
    return model(pixels).patches.flatten(1, 2).mean(dim=1)


def embed_texts(model: Any, texts: list[str]) -> Tensor:
    """Texts -> B C, not normalised. Raises ConfigError for a model without a text tower."""
    if not hasattr(model, "encode_text"):
        raise ConfigError(f"{type(model).__name__} has no text tower; use a CLIP model, such as PE-Core, for texts")
    return model.encode_text(model.tokenize(texts))


def embedding_width(model: Any) -> int:
    """C, from the sizes of the model where it tells them."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision", config)
    return int(getattr(config, "output_width", None) or getattr(model, "width", None) or 0)


class Embeddings(NamedTuple):
    """What an embedding file holds.

    vectors      N C float32
    names        N, what each row is of
    fingerprint  of the model and its preprocessing; vectors of different fingerprints do not compare
    """

    vectors: Tensor
    names: list[str]
    fingerprint: str


def fingerprint(model: Any) -> str:
    """A short hash of the weights' shape and a sample of their values, and of the preprocessing.

    A fast twin carries that of the model it came from, with `-int8` or `-fp8` behind it where it rounds. Preprocessing
    it was given since then makes it another.
    """
    if isinstance(known := getattr(model, "fingerprint", None), str):
        now = str(model.preprocess.fingerprint())
        if now == getattr(model, "marked", now):
            return known
        rounds = next((mark for mark in ("-int8", "-fp8") if known.endswith(mark)), "")
        return hashlib.sha256(f"{known} {now}".encode()).hexdigest()[:16] + rounds
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sample = tensor.detach().flatten()[:64].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    digest.update(str(model.preprocess.fingerprint()).encode())
    return digest.hexdigest()[:16]


def save_embeddings(path: str | Path, embeddings: Embeddings) -> None:
    """A safetensors file: `vectors`, with the names and the fingerprint in its header. Whole or not there."""
    if len(embeddings.vectors) != len(embeddings.names):
        raise ConfigError(
            f"{len(embeddings.vectors)} vectors and {len(embeddings.names)} names; one name a vector is needed"
        )
    header = {
        "format": "perception-embeddings-1",
        "names": json.dumps(embeddings.names),
        "fingerprint": embeddings.fingerprint,
    }
    with atomic_write(path) as temporary:
        save_file({"vectors": embeddings.vectors.contiguous()}, temporary, metadata=header)


def load_embeddings(path: str | Path) -> Embeddings:
    """Raises CheckpointError for a file that `save_embeddings` did not write."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != "perception-embeddings-1":
                raise CheckpointError(f"{path} is not an embedding file; write one with `perception embed`")
            return Embeddings(file.get_tensor("vectors"), json.loads(header["names"]), header["fingerprint"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as an embedding file: {error}") from error


def nearest(query: Tensor, vectors: Tensor, k: int = 5) -> list[list[tuple[int, float]]]:
    """The k rows of `vectors` with the highest dot product to each query: exact, for collections that fit in memory."""
    scores, rows = (query.float() @ vectors.T).topk(min(k, len(vectors)))
    return [list(zip(r, s, strict=True)) for r, s in zip(rows.tolist(), scores.tolist(), strict=True)]
