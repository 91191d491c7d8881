"""A decoder of your own: a module with `width`, `embed` and a call. It inherits nothing from us."""

import torch
from torch import Tensor, nn

import perception_encoder as pe
import perception_lm as plm
from perception.pixels import PixelSpec
from perception_encoder import samples


class Recurrent(nn.Module):
    """A GRU over what it is shown: causal by its nature, and no attention anywhere."""

    def __init__(self, vocab: int, width: int = 64):
        super().__init__()
        self.width = width
        self.table = nn.Embedding(vocab, width)
        self.gru = nn.GRU(width, width, batch_first=True)

    def embed(self, tokens: Tensor) -> Tensor:  # B T -> B T E
        return self.table(tokens)

    def forward(self, x: Tensor, cache: None = None) -> Tensor:  # B T E -> B T V
        return self.gru(x)[0] @ self.table.weight.T


words, spec = plm.LlamaTokenizer.of_bytes(), PixelSpec(size=32, interpolation="bicubic")
small = pe.VisionConfig(image_size=32, patch_size=8, width=32, depth=1, heads=2, mlp_width=64, pool=None)
torch.manual_seed(0)
assistant = plm.compose(encoder=pe.VisionTransformer(small, spec), decoder=Recurrent(words.vocab), tokenizer=words)

photo = samples.photos()["chelsea"]
messages = [{"role": "user", "content": [{"type": "image", "image": photo}, {"type": "text", "text": "What is this?"}]}]
batch = assistant.processor([messages], max_tiles=4)
print("tokens", tuple(batch.tokens.shape), "pixels", tuple(batch.pixels.shape))
loss, logits = assistant.model(batch.tokens, batch.pixels, labels=batch.tokens)
loss.backward()
print("logits", tuple(logits.shape), "loss", round(loss.item(), 2), "and it can be trained")
print("untrained, it says", repr(assistant.generate([messages], max_tiles=4, max_new_tokens=8)[0].text))
