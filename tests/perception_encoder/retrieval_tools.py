"""Small sources, and folders as bytes."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def pictures(folder: Path, count: int, *, size: tuple[int, int] = (30, 20)) -> list[str]:
    """Pictures of noise, each another."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for seed in range(count):
        codes = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
        files.append(str(folder / f"{seed:04d}.png"))
        Image.fromarray(codes.to(torch.uint8).numpy()).save(files[-1])
    return files


def tar(path: Path, files: Sequence[str]) -> Path:
    """A WebDataset shard of pictures with a caption and a table each."""
    with tarfile.open(path, "w") as archive:
        for number, file in enumerate(files):
            table = json.dumps({"number": number, "even": number % 2 == 0}).encode()
            caption = f"picture {number}".encode()
            for suffix, data in ((".png", Path(file).read_bytes()), (".txt", caption), (".json", table)):
                member = tarfile.TarInfo(f"a/{number:04d}{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def contents(folder: Path, *, without: Sequence[str] = (".lock", "report.json")) -> dict[str, str]:
    """Every file and a hash of its bytes; `report.json` holds times, which are never the same twice."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in without
    }


def clustered(rows: int, width: int, *, centres: int = 40, seed: int = 0) -> Tensor:
    """Vectors of length 1 in clusters, as embeddings are."""
    random = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, width, generator=random)
    noise = 0.5 * torch.randn(rows, width, generator=random)
    return torch.nn.functional.normalize(middle[torch.randint(0, centres, (rows,), generator=random)] + noise, dim=1)
