"""Losses that tie two embeddings together. All take embeddings of any length and normalise them.

All are computed in float32, whatever the passes are in: bf16 has steps of 0.5 between 64 and 128, where logits are.

B batch  C embedding width  K classes
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def clip_loss(image: Tensor, text: Tensor, scale: Tensor | float, *, gather: bool = False) -> Tensor:
    """Each picture finds its text among the batch's, and each text its picture (Radford et al. 2021, figure 3).

    image, text  B C; row i of one belongs to row i of the other
    scale        the factor on the cosines, `exp(logit_scale)`
    gather       use the texts and pictures of every process of the default group as negatives; every process must
                 hold the same B, and the mean over processes of this loss is the loss of the whole batch
    """
    image, text = unit(image), unit(text)
    everything = gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    images, texts = (gathered(image), gathered(text)) if everything else (image, text)
    first = len(image) * dist.get_rank() if everything else 0
    target = first + torch.arange(len(image), device=image.device)
    return (F.cross_entropy(scale * image @ texts.T, target) + F.cross_entropy(scale * text @ images.T, target)) / 2


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in float32."""
    return F.normalize(x.float(), dim=-1)


def gathered(x: Tensor) -> Tensor:
    """The rows of every process, in rank order; gradients go back to the process a row came from."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


def concept_loss(image: Tensor, concepts: Tensor, target: Tensor, scale: Tensor | float, smooth: float = 0.0) -> Tensor:
    """Each picture finds its concept among all of them: the CLIP loss with every concept as a negative.

    image     B C
    concepts  K C, a text embedding of every concept
    target    B, index of the picture's concept
    smooth    label smoothing: this share of the target is spread evenly
    """
    logits = scale * unit(image) @ unit(concepts).T
    return F.cross_entropy(logits, target, label_smoothing=smooth)


def cosine_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cosine between the student's embedding and the teacher's. B C, B C -> scalar"""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()


def similarity_distillation(student: Tensor, teacher: Tensor, scale: float = 20.0) -> Tensor:
    """The student ranks the batch's other rows as the teacher does: KL divergence of the rows' similarities.

    student, teacher  B C and B D; the widths may differ
    scale             the factor on the cosines before the softmax
    """
    B, self_mask = len(student), torch.eye(len(student), dtype=torch.bool, device=student.device)
    wanted, given = (
        (scale * x @ x.T)[~self_mask].view(B, B - 1).log_softmax(-1)  # a row is nearest to itself: nothing to learn
        for x in (unit(teacher), unit(student))
    )
    return F.kl_div(given, wanted, log_target=True, reduction="batchmean")
