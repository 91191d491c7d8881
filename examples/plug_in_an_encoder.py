"""An encoder of your own: a class with `width`, `patch_size`, `preprocess` and a call. It inherits nothing from us."""

import torch
from torch import Tensor, nn

import perception_encoder as pe
import perception_lm as plm
from perception.pixels import PixelSpec
from perception_encoder import samples


class ColourGrid(nn.Module):
    """The mean and spread of the colours of each patch: no learning, six channels."""

    width, patch_size = 6, 16

    def __init__(self) -> None:
        super().__init__()
        self.preprocess = PixelSpec(size=224, resize="crop", interpolation="bicubic")
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, pixels: Tensor) -> pe.Features:  # B 3 H W
        tiles = pixels.unfold(2, 16, 16).unfold(3, 16, 16).flatten(4)  # B 3 h w 256
        grid = torch.cat([tiles.mean(-1), tiles.std(-1)], dim=1).permute(0, 2, 3, 1)  # B h w 6
        return pe.Features(patches=grid * self.scale, prefix=grid.new_zeros(len(grid), 0, 6))


encoder = ColourGrid()
assert isinstance(encoder, pe.VisionEncoder)
photos = samples.photos()
vectors = pe.embed(encoder, list(photos.values()))
closest = (vectors @ vectors.T).fill_diagonal_(-1).argmax(dim=1)
for name, row in zip(photos, closest.tolist(), strict=True):
    print(f"{name:<12} has colours like {list(photos)[row]}")

# The same encoder under a language model: a fresh projector and a small decoder with random weights.
words = plm.LlamaTokenizer.of_bytes()
small = plm.DecoderConfig(width=64, depth=1, heads=4, kv_heads=2, mlp_width=128, vocab=words.vocab)
assistant = plm.compose(encoder=encoder, decoder=small, tokenizer=words)
print("untrained, it says", repr(assistant.ask(photos["chelsea"], "What is this?", tiling="vanilla", max_new_tokens=8)))
