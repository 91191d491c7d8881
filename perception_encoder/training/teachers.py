"""The two teachers, needed only while training: an ImageNet CNN for pictures, a sentence encoder for words.

Both are read from packages that ship the weights (`perception_encoder.training.drawings` fetches them) and written here
from their papers and the shapes of their tensors.

B batch  C channels  h w grid  n word pieces
"""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from perception.attention import attend
from perception.errors import MediaError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Stride of the first block, blocks (Tan & Le 2019, table 1; the "lite" variant has no squeeze-and-excitation).
STAGES = ((1, 1), (2, 2), (2, 2), (2, 3), (1, 3), (2, 4), (1, 1))
PLACES = 112  # channels of the last stage with a sixteenth of the picture's side


def _find(folder: str | Path, pattern: str) -> Path:
    """The one file of that name anywhere in an unpacked package. Raises MediaError where there is none."""
    found = list(Path(folder).rglob(pattern))
    if len(found) != 1:
        raise MediaError(
            f"{len(found)} files {pattern} in {folder}, where a teacher is looked for; "
            "run `python -m perception_encoder.training.drawings`, which downloads it"
        )
    return found[0]


class EfficientNetLite0:
    """ImageNet features and logits of EfficientNet-Lite0 (Tan & Le 2019; 224 pixels, ReLU6).

    Call with pixels in [0, 1]: B 3 224 224 -> features B 1280; other multiples of 32 work. `both` gives besides what
    each place of the picture shows, B 112 14 14. `logits(features)` -> B 1000.
    """

    def __init__(self, folder: str | Path):
        self.weights = torch.load(_find(folder, "efficientnet-lite0-*.pth"), map_location="cpu", weights_only=True)

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.both(pixels)[0]

    @torch.inference_mode()
    def both(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        x = (pixels - mean[:, None, None]) / std[:, None, None]
        x = F.relu6(self._norm(self._conv(x, "_conv_stem", stride=2), "_bn0"))  # B 32 112 112
        index, places = 0, x
        for stride, blocks in STAGES:
            for i in range(blocks):
                x = self._block(x, f"_blocks.{index}.", stride if i == 0 else 1)
                index += 1
            places = x if x.shape[1] == PLACES else places
        x = F.relu6(self._norm(self._conv(x, "_conv_head"), "_bn1"))  # B 1280 7 7
        return x.mean((2, 3)), places

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weights["_fc.weight"], self.weights["_fc.bias"])

    def _block(self, x: Tensor, name: str, stride: int) -> Tensor:
        """Widen, convolve each channel, narrow; the input is added where the shape allows."""
        y = x
        if f"{name}_expand_conv.weight" in self.weights:
            y = F.relu6(self._norm(self._conv(y, f"{name}_expand_conv"), f"{name}_bn0"))
        y = F.relu6(self._norm(self._conv(y, f"{name}_depthwise_conv", stride), f"{name}_bn1"))
        y = self._norm(self._conv(y, f"{name}_project_conv"), f"{name}_bn2")
        return x + y if x.shape == y.shape else y

    def _conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, groups=x.shape[1] // weight.shape[1])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        w = self.weights
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-3)


class MiniLM:
    """Sentence embeddings of all-MiniLM-L6-v2 (Wang et al. 2020; Reimers & Gurevych 2019): texts -> B 384."""

    heads = 12

    def __init__(self, folder: str | Path):
        file = _find(folder, "model.safetensors")
        self.weights = load_file(file)
        self.depth = json.loads(file.with_name("config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        self.pieces = WordPieces(file.with_name("vocab.txt"))

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Texts of like length share a batch, so little of it is padding."""
        ids = [self.pieces(text) for text in texts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = torch.empty(len(ids), self.weights["embeddings.LayerNorm.weight"].numel())
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            longest = max(len(ids[i]) for i in rows)
            tokens = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in rows])
            out[rows] = self._embed(tokens)
        return out

    def _embed(self, tokens: Tensor) -> Tensor:  # B n -> B 384
        w, there = self.weights, tokens != 0
        x = (
            w["embeddings.word_embeddings.weight"][tokens]
            + w["embeddings.position_embeddings.weight"][: tokens.shape[1]]
        )
        x = self._norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for i in range(self.depth):
            name = f"encoder.layer.{i}."
            q, k, v = (
                self._linear(x, f"{name}attention.self.{part}").unflatten(-1, (self.heads, -1))
                for part in ("query", "key", "value")
            )
            y = attend(q, k, v, mask=there[:, None, None, :]).flatten(2)
            x = self._norm(x + self._linear(y, f"{name}attention.output.dense"), f"{name}attention.output.LayerNorm")
            y = self._linear(F.gelu(self._linear(x, f"{name}intermediate.dense")), f"{name}output.dense")
            x = self._norm(x + y, f"{name}output.LayerNorm")
        mean = (x * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps=1e-12)


class WordPieces:
    """BERT's uncased tokenizer (Devlin et al. 2019): words and marks apart, then the longest known piece at a time."""

    def __init__(self, vocabulary: Path):
        lines = vocabulary.read_text(encoding="utf-8").splitlines()
        self.ids = {piece: i for i, piece in enumerate(lines)}
        self.unknown, self.start, self.end = (self.ids[name] for name in ("[UNK]", "[CLS]", "[SEP]"))

    def __call__(self, text: str, longest: int = 128) -> list[int]:
        plain = unicodedata.normalize("NFD", text.lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
        spaced = "".join(f" {c} " if self._alone(c) else c for c in plain)
        ids = [i for word in spaced.split() for i in self._word(word)]
        return [self.start, *ids[: longest - 2], self.end]

    @staticmethod
    def _alone(c: str) -> bool:
        """Punctuation as BERT counts it: every ASCII mark, and Unicode's."""
        return (c.isascii() and c.isprintable() and not c.isalnum() and c != " ") or unicodedata.category(c)[0] == "P"

    def _word(self, word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = word[start:end] if start == 0 else f"##{word[start:end]}"
                if piece in self.ids:
                    ids.append(self.ids[piece])
                    start = end
                    break
            else:
                return [self.unknown]
        return ids
