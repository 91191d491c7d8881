"""Class names to a classifier, without training (Radford et al. 2021, section 3.1).

B pictures  K classes  T templates  C embedding width
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.errors import MediaError
from perception_encoder.clip import CLIP
from perception_encoder.images import Failure, pixel_batches

# Written for this library: plain frames for photographs and pictures. For published ImageNet numbers give the
# templates of that protocol; class names and templates are data of the evaluation, not of the model.
PHOTO_TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a close view of a {}.",
    "a {} seen from afar.",
    "a picture that shows a {}.",
    "one {} in a scene.",
    "several of the kind: {}.",
)
PARTS = ("encode_text", "encode_image", "tokenize", "preprocess", "logit_scale")  # of a model that classifies
DRAWING_TEMPLATES = ("a drawing of a {}", "an emoji of {}", "a picture of a {}", "{}")


class Prediction(NamedTuple):
    label: str
    score: float  # probability over the labels given


class ZeroShotClassifier:
    """One weight vector a label: the mean of its templates' embeddings, each of length 1, brought back to length 1.

    model      a CLIP model: anything with encode_image, encode_text, tokenize, preprocess, logit_scale
    labels     class names, or a text file with one a line
    templates  sentences with `{}` where the label goes; `None`: PHOTO_TEMPLATES. `{}` inside a label is plain text.

    Raises ValueError when there are no labels or no templates, or a template has no `{}`, TypeError for a tower alone.
    Labels that occur twice are kept, with a warning: they share their probability.
    """

    def __init__(
        self,
        model: CLIP,
        labels: Sequence[str] | str | Path,
        templates: Sequence[str] | str | None = None,
        *,
        batch_size: int = 256,
    ):
        if lacks := [part for part in PARTS if not hasattr(model, part)]:
            raise TypeError(
                f"a classifier needs a CLIP model (load_clip); given {type(model).__name__}, which has no "
                f"{', no '.join(lacks)}"
            )
        self.model = model
        self.labels = read_labels(labels)
        self.templates = check_templates(PHOTO_TEMPLATES if templates is None else templates)
        if repeated := sorted(label for label, times in Counter(self.labels).items() if times > 1):
            warnings.warn(f"labels given more than once share their probability: {repeated[:5]}", stacklevel=2)
        self.weights = classifier_weights(model, self.labels, self.templates, batch_size=batch_size)  # K C

    def logits(self, image_features: Tensor) -> Tensor:
        """B C -> B K: the model's own scale times the cosine of picture and label."""
        image_features = F.normalize(image_features.float(), dim=-1).to(self.weights.device)
        return self.model.logit_scale.detach().exp().float() * image_features @ self.weights.T

    @torch.inference_mode()
    def predict(
        self, images: Any, top: int = 5, *, batch_size: int = 32, on_error: str = "raise", progress: bool = False
    ) -> list[list[Prediction]]:
        """The `top` most likely labels of each picture, best first, with probabilities over all labels.

        images    one picture or many: paths, bytes, PIL images, arrays, or a tensor of B 3 S S prepared pixels
        on_error  "raise" names the picture that cannot be read; "skip" gives it an empty list
        """
        if top < 1:
            raise ValueError(f"top={top}; ask for at least one label")
        top = min(top, len(self.labels))
        rows: list[list[Prediction]] = []
        for pixels, failures in pixel_batches(
            images, self.model.preprocess, batch_size=batch_size, on_error=on_error, progress=progress
        ):
            rows += self._rows(pixels, failures, top)
        return rows

    def _rows(self, pixels: Tensor, failures: Sequence[Failure], top: int) -> list[list[Prediction]]:
        rows = []
        if len(pixels):
            scores, indices = self.logits(self.model.encode_image(pixels)).softmax(-1).topk(top)
            for score, index in zip(scores.tolist(), indices.tolist(), strict=True):
                rows.append([Prediction(self.labels[i], s) for i, s in zip(index, score, strict=True)])
        for failure in failures:  # in order, so that each empty row lands where its picture was
            rows.insert(failure.position, [])
        return rows


@torch.inference_mode()
def classifier_weights(
    model: CLIP, labels: Sequence[str], templates: Sequence[str], *, batch_size: int = 256
) -> Tensor:
    """K C float32, rows of length 1: normalise each text, mean over the templates, normalise.

    All prompts are encoded in large batches rather than class by class, in the order of the alphabet: texts that begin
    alike then meet in one batch, where a fast text tower computes their common beginning once.
    """
    prompts = [template.replace("{}", label) for label in labels for template in templates]
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    chunks = [[prompts[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    encoded = torch.cat([model.encode_text(model.tokenize(chunk)).float() for chunk in chunks])
    texts = torch.empty_like(encoded)  # K*T C
    texts[torch.tensor(order, device=encoded.device)] = encoded
    texts = F.normalize(texts, dim=-1).unflatten(0, (len(labels), len(templates)))
    return F.normalize(texts.mean(dim=1), dim=-1)


def read_labels(labels: Sequence[str] | str | Path) -> list[str]:
    """A list of labels as it is, or the non-empty lines of a UTF-8 text file. ValueError when there are none."""
    if isinstance(labels, str | Path):
        path = Path(labels)
        if not path.is_file():
            raise ValueError(f"labels are a list, or a text file with one a line; there is no file {str(path)!r}")
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MediaError(f"{path} is not UTF-8 text: {error}") from error
        labels = [line.strip() for line in text.splitlines() if line.strip()]
    labels = list(labels)
    if not labels:
        raise ValueError("no labels given; a classifier needs at least one class name")
    if bad := [label for label in labels if not isinstance(label, str)]:
        raise TypeError(f"labels are texts; given {bad[0]!r}")
    return labels


def check_templates(templates: Sequence[str] | str) -> list[str]:
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates:
        raise ValueError("no templates given; use ['{}'] to embed the bare labels")
    if bad := [template for template in templates if "{}" not in template]:
        raise ValueError(f"template {bad[0]!r} has no '{{}}' where the label goes")
    return templates
