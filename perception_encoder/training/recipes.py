"""Towers made from a trained one: cut for a language model, or taught by one of their own inner layers.

B batch  N tokens  D width
"""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from perception.errors import ConfigError
from perception_encoder.training.losses import unit
from perception_encoder.vision import VisionTransformer


def to_lang(tower: VisionTransformer, *, drop_last: int = 1, layer_scale: float | None = 0.1) -> VisionTransformer:
    """PE-Core to the beginning of a PE-Lang (Bolya et al. 2025, section 4): its best layer for language, made the last.

    The last blocks, the final norm, the pool and the projection go; every branch gets a gain. What is left is then
    trained through a small decoder.

    drop_last    blocks that go; 1 of PE-Core-L's 24 and 3 of PE-Core-G's 50, as published
    layer_scale  start of the gains: 0.1 as published, which changes what the tower says until it is trained; 1 leaves
                 its inner features as they were, bit for bit; None adds none. Gains that are there stay.

    Raises ConfigError for more blocks than there are.
    """
    return adapt_tower(tower, depth=tower.config.depth - drop_last, layer_scale=layer_scale)


def to_spatial(tower: VisionTransformer, *, layer_scale: float | None = None) -> VisionTransformer:
    """PE-Core to the beginning of a PE-Spatial (Bolya et al. 2025, section 5): all blocks, no final norm, no pool.

    `SelfDistillation` then teaches its last block what an inner one says.
    """
    return adapt_tower(tower, layer_scale=layer_scale)


def adapt_tower(
    tower: VisionTransformer,
    *,
    image_size: int | None = None,
    depth: int | None = None,
    layer_scale: float | None = None,
) -> VisionTransformer:
    """A tower for others to build on from one that was trained alone: no final norm, no pooling head, same weights.

    image_size   positions are stretched bilinearly to its grid, once, and learn from there
    depth        the first blocks that stay (23 of PE-Core-L's 24, 47 of PE-Core-G's 50)
    layer_scale  gains of the blocks' branches begin at this; those that are there stay

    Raises ConfigError for a depth it does not have.
    """
    old = tower.config
    depth = old.depth if depth is None else depth
    if not 1 <= depth <= old.depth:
        raise ConfigError(f"depth={depth} of a tower of {old.depth} blocks; expected 1 to {old.depth}")
    size = old.image_size if image_size is None else image_size
    start = old.layer_scale if old.layer_scale is not None else layer_scale
    config = replace(
        old, image_size=size, depth=depth, layer_scale=start, norm_post=False, pool=None, output_width=None
    )
    like = tower.pos_embed
    # Weights that are not carried over, the gains, have fixed values: the global generator is left alone.
    with torch.random.fork_rng(devices=[]), torch.device(like.device):
        new = VisionTransformer(config, replace(tower.preprocess, size=size)).to(like.dtype)
    kept = new.state_dict()
    carried = {name: tensor for name, tensor in tower.state_dict().items() if name in kept}
    carried["pos_embed"] = tower.positions(config.grid, config.grid).detach()
    new.load_state_dict({**kept, **carried})
    return new


class SelfDistillation(nn.Module):
    """A tower's last tokens learn what a frozen copy says at an inner layer, one by one and to each other.

    The inner layer of PE-Core knows best where things are; the last one forgets it (Bolya et al. 2025, section 5).

    layer       block of the frozen copy that teaches
    similarity  weight of the tokens' cosines to each other, beside each token's own direction

    Call with pixels B 3 H W -> scalar. Raises ConfigError for a layer that is not there.
    """

    def __init__(self, student: VisionTransformer, teacher: VisionTransformer, layer: int, similarity: float = 1.0):
        super().__init__()
        depth = teacher.config.depth
        if not -depth <= layer < depth:
            raise ConfigError(f"no layer {layer} in a tower of {depth} blocks; give {-depth} to {depth - 1}")
        if student.width != teacher.width or student.patch_size != teacher.patch_size:
            raise ConfigError("student and teacher differ in width or patch size; one tower teaches itself here")
        self.student, self.layer, self.similarity = student, layer % depth, similarity
        self.teacher = [deepcopy(teacher).requires_grad_(False).eval()]  # a list: it is not part of what is saved

    def forward(self, pixels: Tensor) -> Tensor:
        (teacher,) = self.teacher
        with torch.no_grad():
            wanted = unit(teacher.to(pixels.device).intermediates(pixels, [self.layer])[0].tokens())
        given = unit(self.student(pixels).tokens())
        loss = 1 - (given * wanted).sum(-1).mean()
        if self.similarity:
            loss = loss + self.similarity * (given @ given.mT - wanted @ wanted.mT).square().mean()
        return loss
