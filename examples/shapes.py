"""Every shape between pixels and features, from a model built on the meta device: no weights, no memory."""

import sys

import torch

import perception_encoder as pe
from perception.rope import rope_2d
from perception_encoder.zoo import describe


def shapes(name: str) -> list[tuple[str, str]]:
    """(step, shape) for a published model; B stands for the batch."""
    facts = describe(name)
    config = pe.VisionConfig.from_dict(facts["vision"])
    with torch.device("meta"):
        tower = pe.VisionTransformer(config)
        pixels = torch.zeros(1, 3, config.image_size, config.image_size)
        cut = tower.patch_embed(pixels).flatten(2).transpose(1, 2)
        features = tower(pixels)
    positions = tower.positions(config.grid, config.grid)
    cos, _ = rope_2d(config.grid, config.grid, config.head_dim, prefix=int(config.class_token))
    rows = [
        ("resize, normalise", show(pixels[0])),
        ("cut into patches", batch(cut)),
        ("class token, positions", f"B {show(positions)}"),
        ("rotary table", show(cos)),
        (f"{config.depth} blocks", batch(features.tokens())),
        ("on the grid", f"patches {batch(features.patches)}, prefix {batch(features.prefix)}"),
    ]
    if config.pool:
        with torch.device("meta"):
            rows.append(("pool, project", batch(tower.pooled(pixels))))
    return rows


def show(tensor: torch.Tensor) -> str:
    return " ".join(str(side) for side in tensor.shape)


def batch(tensor: torch.Tensor) -> str:
    return " ".join(["B", *(str(side) for side in tensor.shape[1:])])


if __name__ == "__main__":
    for step, shape in shapes(sys.argv[1] if len(sys.argv) > 1 else "PE-Core-L14-336"):
        print(f"{step:<24}{shape}")
