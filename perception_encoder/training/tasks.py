"""What a pass of each kind of run makes of a batch: a loss, summed over its samples.

B batch  C embedding width  K classes
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.training.distributed import whole_tensor
from perception.training.trainer import Loss
from perception_encoder.clip import CLIP
from perception_encoder.training.config import LossConfig
from perception_encoder.training.flops import tower_flops, vision_flops
from perception_encoder.training.losses import clip_loss, cosine_distillation, gathered, similarity_distillation
from perception_encoder.training.pairs import Batch
from perception_encoder.training.recipes import SelfDistillation
from perception_encoder.vision import VisionTransformer

MAX_SCALE = 100.0  # of the logits (Radford et al. 2021, section 2.5)


class Scale(nn.Module):
    """The factor on the cosines: e to the power of one number that learns. Never in less than float32."""

    def __init__(self, value: Tensor):
        super().__init__()
        # One number as a vector: a parameter without axes cannot be spread over processes.
        self.value = nn.Parameter(value[None])

    def forward(self) -> Tensor:
        return self.value[0].exp().clamp(max=MAX_SCALE)


class ContrastiveTask(nn.Module):
    """CLIP's loss over all processes' samples, and a teacher's picture embeddings where there is one.

    together  several processes: their texts and pictures are negatives, too
    teacher   pixels -> B T, frozen

    It takes the model's logit_scale for itself: until `hand_back` the model cannot be saved.
    """

    def __init__(self, clip: CLIP, loss: LossConfig, *, teacher: Any = None, width: int = 0, together: bool = False):
        super().__init__()
        self.model, self.loss, self.together = clip, loss, together
        value = clip.logit_scale.detach().clone()
        self.logit_scale = Scale(value)
        del clip.logit_scale
        clip.register_buffer("logit_scale", value, persistent=False)
        self.teacher = [teacher]  # a list: it is not part of what is saved
        image_width = clip.config.vision.output_width or clip.vision.width
        self.features = nn.Linear(image_width, width) if teacher is not None and loss.features else None

    def forward(self, batch: Batch) -> Loss:
        device, count = self.logit_scale.value.device, len(batch.pixels)
        pixels = batch.pixels.to(device)
        image, total = self.model.vision.pooled(pixels), torch.zeros((), device=device)
        if self.loss.contrastive:
            text = self.model.text(self.model.tokenize(batch.texts).to(device))
            total = total + self.loss.contrastive * clip_loss(image, text, self.logit_scale(), gather=self.together)
        (teacher,) = self.teacher
        if teacher is not None and batch.teacher is not None:
            with torch.no_grad():
                wanted = teacher(batch.teacher.to(device))
            if self.features is not None:
                total = total + self.loss.features * cosine_distillation(self.features(image), wanted)
            if self.loss.relations:
                ours, theirs = (gathered(image), gathered(wanted)) if self.together else (image, wanted)
                total = total + self.loss.relations * similarity_distillation(ours, theirs)
        return Loss(total * count, count, count * self._flops(batch))

    def hand_back(self) -> None:
        """The model has a logit_scale of its own again, as learned. All processes call it together, at the end."""
        value = whole_tensor(self.logit_scale.value.detach())[0].clone()
        del self.model.logit_scale
        self.model.logit_scale = nn.Parameter(value, requires_grad=self.logit_scale.value.requires_grad)

    def _flops(self, batch: Batch) -> float:
        (teacher,) = self.teacher
        found = vision_flops(self.model.vision, batch.pixels.shape[-1])
        if self.loss.contrastive:
            found += tower_flops(self.model.text, self.model.text.config.context, causal=True)
        if batch.teacher is not None and isinstance(tower := getattr(teacher, "tower", None), VisionTransformer):
            found += vision_flops(tower, batch.teacher.shape[-1])
        return found


class ClassifyTask(nn.Module):
    """Cross-entropy of a linear layer on the tower's pooled output, or on the mean of its patches."""

    def __init__(self, tower: VisionTransformer, classes: Sequence[str], smooth: float):
        super().__init__()
        self.model, self.classes, self.smooth = tower, list(classes), smooth
        width = (tower.config.output_width or tower.width) if tower.pool is not None else tower.width
        self.head = nn.Linear(width, len(classes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Loss:
        device = self.head.weight.device
        assert batch.labels is not None
        features = embed(self.model, batch.pixels.to(device)).float()  # logits in float32, whatever the passes are in
        logits = F.linear(features, self.head.weight.float(), self.head.bias.float())
        loss = F.cross_entropy(logits, batch.labels.to(device), label_smoothing=self.smooth, reduction="sum")
        count = len(batch.pixels)
        return Loss(loss, count, count * vision_flops(self.model, batch.pixels.shape[-1]))


class SpatialTask(nn.Module):
    """A tower that one of its own inner layers teaches; captions are not looked at."""

    def __init__(self, tower: VisionTransformer, teacher: VisionTransformer, loss: LossConfig):
        super().__init__()
        self.distillation = SelfDistillation(tower, teacher, loss.layer, loss.similarity)

    @property
    def model(self) -> VisionTransformer:
        return self.distillation.student

    def forward(self, batch: Batch) -> Loss:
        pixels = batch.pixels.to(self.model.pos_embed.device)
        (teacher,), side = self.distillation.teacher, pixels.shape[-1]
        flops = vision_flops(self.model, side) + vision_flops(teacher, side, blocks=self.distillation.layer + 1)
        return Loss(self.distillation(pixels) * len(pixels), len(pixels), len(pixels) * flops)


def embed(tower: VisionTransformer, pixels: Tensor) -> Tensor:
    """B C: one vector a picture, of any tower."""
    return tower.pooled(pixels) if tower.pool is not None else tower(pixels).patches.mean((1, 2))


def exact(module: nn.Module) -> list[nn.Module]:
    """What stays in float32 where passes are in bf16: as a power of e its steps would be of 1.5 % and more."""
    return [part for part in module.modules() if isinstance(part, Scale)]


def units(module: nn.Module) -> list[nn.Module]:
    """The blocks of all towers: what is sharded and compiled one by one."""
    return [
        block
        for part in module.modules()
        if isinstance(blocks := getattr(part, "blocks", None), nn.ModuleList)
        for block in blocks
    ]
