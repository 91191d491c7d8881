"""The fast twins of the towers on a GPU: the same calls and weights, fused kernels, and graphs for small batches.

B batch  N tokens  P prefix tokens  D width  C output width

The weights are the plain model's own: nothing is packed or copied. A residual branch is added by the norm after it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.attention import attend
from perception.errors import ConfigError
from perception.kernels.graphs import Graphs
from perception.kernels.triton.norm import layer_norm
from perception.kernels.triton.quantized import Code, Product, give_up, settle
from perception.kernels.triton.rotary import rotate_qk
from perception.layers import Mlp
from perception.optimize import FastPart, Plan
from perception.rope import Rope, rope_2d
from perception_encoder.fast import frozen, gain_of
from perception_encoder.pooling import AttentionPool
from perception_encoder.protocol import Features
from perception_encoder.text import TextTransformer, check_tokens
from perception_encoder.vision import VisionTransformer, check_layers, check_pixels, embed_patches, on_grid, stretch

GRAPH_BATCH = 8  # up to here starting the kernels costs more than a copy of the pixels
GRAPHS = 16  # shapes remembered
TABLES = 64  # grids remembered
MODE = "max-autotune-no-cudagraphs"  # of the compiler: what is large enough for it needs no graph
Branch = tuple[Tensor, Tensor | None]  # what a block still owes to x, and its gain
Function = Callable[[Tensor], tuple[Tensor, ...]]
Runner = Callable[[Any, Function, Tensor], tuple[Tensor, ...]]  # (key, function, pixels) -> function(pixels)


def fast_vision(tower: VisionTransformer, plan: Plan) -> "CudaVision":
    """The twin of a tower that lies on a GPU. `plan` as `perception.optimize.optimize` makes it."""
    fast = CudaVision(tower)
    if plan.quantize:
        fast.settle("fp8" if plan.quantize == "fp8" else "int8")
    if not plan.keep:
        give_up(tower, [product for block in fast.blocks for product in block.products])
    return fast


def fast_text(text: TextTransformer, plan: Plan) -> "CudaText":
    """The twin of a text tower that lies on a GPU; never quantised, it is small."""
    fast = CudaText(text)
    if not plan.keep:
        give_up(text, [])
    return fast


class CudaVision(FastPart):
    """What VisionTransformer does, call for call. Raises ConfigError for an input that asks for a gradient."""

    def __init__(self, tower: VisionTransformer):
        super().__init__()
        self.config, self.width, self.patch_size = tower.config, tower.width, tower.patch_size
        self.preprocess, self.source, self.fingerprint = tower.preprocess, tower.source, ""
        self.pos_embed = frozen(tower.pos_embed)
        self.class_token = None if tower.class_token is None else tower.class_token.detach()
        self.patch_embed = tower.patch_embed.weight.detach()
        self.norm_pre = Norm(tower.norm_pre)
        self.blocks = [
            CudaBlock(b.norm1, b.attn.qkv, b.attn.proj, b.norm2, b.mlp, b.attn.heads, b.ls1, b.ls2)
            for b in tower.blocks
        ]
        self.norm_post = Norm(tower.norm_post) if isinstance(tower.norm_post, nn.LayerNorm) else None
        self.pool = None if tower.pool is None else CudaPool(tower.pool)
        self.project = Product(tower.project.weight.detach()) if isinstance(tower.project, nn.Linear) else None
        self.graphs = Graphs(GRAPHS)
        self.large: Runner = directly
        self._tables: dict[tuple[int, int], tuple[Tensor, Rope]] = {}

    def compile(self, **options: Any) -> None:
        """Batches above GRAPH_BATCH go through `torch.compile` from now on, "max-autotune-no-cudagraphs" unless another
        mode is given: minutes at the first batch of each kind. Whether it is worth them is for a GPU to say.

        The compiler sees the plain twins of the kernels and fuses them its own way. Small batches stay with graphs.
        """
        self.large = Compiled(**{"mode": MODE, **options})

    @property
    def device(self) -> torch.device:
        return self.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pos_embed.dtype

    def forward(self, pixels: Tensor) -> Features:
        """The last block's output, before the final norm."""
        return self.intermediates(pixels, [-1])[0]

    def intermediates(self, pixels: Tensor, layers: Sequence[int], *, norm: bool = False) -> list[Features]:
        """As VisionTransformer.intermediates."""
        wanted = check_layers(layers, len(self.blocks))
        h, w = self.grid_of(pixels)
        ordered = tuple(sorted(set(wanted)))
        found = self._run(("layers", ordered, norm), lambda x: self.layers(x, ordered, norm), pixels)
        named = dict(zip(ordered, found, strict=True))
        return [on_grid(named[index], h, w) for index in wanted]

    def pooled(self, pixels: Tensor) -> Tensor:
        """As VisionTransformer.pooled."""
        if self.pool is None:
            raise ConfigError("this tower has no pooling head (PE-Lang and PE-Spatial have none); use its patches")
        self.grid_of(pixels)
        return self._run(("pooled",), self.embedding, pixels)[0]

    def grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """The h, w patch grid of a batch of pixels; ConfigError when they do not fit this tower."""
        return check_pixels(pixels, self.patch_size)

    def positions(self, h: int, w: int) -> Tensor:
        """P+h*w D, as VisionTransformer.positions."""
        return stretch(self.pos_embed, self.config.grid, h, w)

    def layers(self, pixels: Tensor, wanted: Sequence[int], norm: bool) -> tuple[Tensor, ...]:
        """The tokens B P+h*w D after the blocks wanted, which ascend."""
        h, w = self.grid_of(pixels)
        pos, rope = self._table(h, w)
        x = embed_patches(pixels, self.patch_embed).flatten(1, 2)  # B h*w D
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        x = self.norm_pre(x + pos)
        owed: Branch | None = None
        found = []
        for index, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            x, owed = block(x, owed, rope)
            if index in wanted:
                whole = settled(x, owed)
                found.append(self.norm_post(whole) if norm and self.norm_post else whole)
        return tuple(found)

    def embedding(self, pixels: Tensor) -> tuple[Tensor]:
        """The pooled embedding B C, in a tuple as graphs return."""
        assert self.pool is not None
        (x,) = self.layers(pixels, [len(self.blocks) - 1], True)
        x = self.pool(x)
        return (x if self.project is None else self.project(x),)

    def settle(self, code: Code = "int8") -> list[float]:
        """Eight bits for the products of the blocks that harm neither them nor the last tokens: the cosine of each, on
        a made-up picture."""
        products = [product for block in self.blocks for product in block.products]
        picture, last = sample_picture(self.config.image_size, self.pos_embed), [len(self.blocks) - 1]
        with torch.no_grad():
            return settle(products, lambda: self.layers(picture, last, True)[0], code)

    def _run(self, key: Any, function: Function, pixels: Tensor) -> tuple[Tensor, ...]:
        """Small batches through a graph, large ones directly; what comes back is the caller's to keep."""
        self.check_inference(pixels)
        with torch.no_grad():
            pixels = pixels.to(self.device, self.dtype)
            grid = self.grid_of(pixels)
            with self.graphs.lock:  # no other thread may forget the grid in between
                if grid not in self._tables and len(self._tables) >= TABLES:
                    self._tables.clear()
                    self.graphs.clear()
                self._table(*grid)  # before any graph, which only reads it
                if 0 < len(pixels) <= GRAPH_BATCH:
                    return self.graphs(key, function, pixels)
            return self.large(key, function, pixels)

    def _table(self, h: int, w: int) -> tuple[Tensor, Rope]:
        """Positions and angles of a grid. Graphs read them where they lie, so they go together."""
        found = self._tables.get((h, w))
        if found is None:
            pos = self.positions(h, w)
            found = pos, rope_2d(h, w, self.config.head_dim, prefix=len(pos) - h * w, device=pos.device)
            found = self._tables.setdefault((h, w), found)  # one for all threads: a graph may read it already
        return found


def directly(key: Any, function: Function, pixels: Tensor) -> tuple[Tensor, ...]:
    return function(pixels)


class Compiled:
    """Runs functions through `torch.compile`, each key's compiled once."""

    def __init__(self, **options: Any):
        self.options = options
        self.kept: dict[Any, Function] = {}

    def __call__(self, key: Any, function: Function, pixels: Tensor) -> tuple[Tensor, ...]:
        if key not in self.kept:
            self.kept[key] = torch.compile(function, **self.options)
        return self.kept[key](pixels)


class CudaText(FastPart):
    """What TextTransformer does, as far as the longest text: attention is causal, so what follows changes nothing."""

    def __init__(self, text: TextTransformer):
        super().__init__()
        self.config, self.width = text.config, text.width
        self.token_embed, self.pos_embed = frozen(text.token_embed.weight), frozen(text.pos_embed)
        self.blocks = [CudaBlock(b.norm1, b.attn.qkv, b.attn.proj, b.norm2, b.mlp, b.attn.heads) for b in text.blocks]
        self.norm, self.project = Norm(text.norm), Product(text.project.weight.detach())

    @property
    def device(self) -> torch.device:
        return self.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pos_embed.dtype

    @torch.no_grad()  # ids carry no gradients
    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, self.config.context)
        tokens = tokens.to(self.device)
        end = tokens.argmax(dim=-1)  # B
        longest = int(end.max()) + 1 if len(tokens) else 1
        tokens = tokens[:, :longest]
        x = F.embedding(tokens, self.token_embed) + self.pos_embed[:longest]  # B n D
        owed: Branch | None = None
        for block in self.blocks:
            x, owed = block(x, owed, None)
        x = settled(x, owed)
        x = x.gather(1, end[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]  # B D
        return self.project(self.norm(x))


class CudaBlock:
    """A block of either tower; `x` is written over. Without angles it is the text tower's, and causal."""

    def __init__(
        self,
        norm1: nn.LayerNorm,
        qkv: nn.Linear,
        proj: nn.Linear,
        norm2: nn.LayerNorm,
        mlp: Mlp,
        heads: int,
        ls1: nn.Module | None = None,
        ls2: nn.Module | None = None,
    ):
        self.norm1, self.norm2, self.heads = Norm(norm1), Norm(norm2), heads
        self.qkv, self.proj, self.fc1, self.fc2 = map(product, (qkv, proj, mlp.fc1, mlp.fc2))
        self.gain1, self.gain2 = gain_of(ls1), gain_of(ls2)

    @property
    def products(self) -> list[Product]:
        return [self.qkv, self.proj, self.fc1, self.fc2]

    def __call__(self, x: Tensor, owed: Branch | None, rope: Rope | None) -> tuple[Tensor, Branch]:
        qkv = self.qkv(self.norm1(x, owed)).unflatten(-1, (3, self.heads, -1))  # B N 3 heads head_dim
        if rope is not None:
            rotate_qk(qkv, rope)
        attended = attend(*qkv.unbind(2), causal=rope is None).flatten(2)
        normed = self.norm2(x, (self.proj(attended), self.gain1))
        return x, (self.fc2(F.gelu(self.fc1(normed))), self.gain2)


class Norm:
    """A LayerNorm that first adds what a block owes to x."""

    def __init__(self, norm: nn.LayerNorm):
        self.weight, self.bias, self.eps = norm.weight.detach(), norm.bias.detach(), norm.eps

    def __call__(self, x: Tensor, owed: Branch | None = None) -> Tensor:
        branch, gain = owed or (None, None)
        return layer_norm(x, self.weight, self.bias, self.eps, branch, gain)


class CudaPool:
    """What AttentionPool does."""

    def __init__(self, pool: AttentionPool):
        D = pool.probe.shape[-1]
        weight, bias = pool.qkv.weight.detach(), pool.qkv.bias.detach()
        self.heads, self.proj, self.norm = pool.heads, product(pool.proj), Norm(pool.norm)
        self.fc1, self.fc2 = product(pool.mlp.fc1), product(pool.mlp.fc2)
        self.query = F.linear(pool.probe.detach(), weight[:D], bias[:D])  # 1 1 D: it is the same for every picture
        self.kv = Product(weight[D:], bias[D:])

    def __call__(self, tokens: Tensor) -> Tensor:  # B N D -> B D
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).unbind(2)
        q = self.query.expand(len(tokens), -1, -1).unflatten(-1, (self.heads, -1))
        x = self.proj(attend(q, k, v).flatten(2))[:, 0]
        return x + self.fc2(F.gelu(self.fc1(self.norm(x.contiguous()))))


def settled(x: Tensor, owed: Branch | None) -> Tensor:
    """x with what is owed to it, as a new tensor."""
    if owed is None:
        return x.clone()
    branch, gain = owed
    return x + (branch if gain is None else branch * gain)


def product(linear: nn.Linear) -> Product:
    return Product(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


def sample_picture(size: int, like: Tensor) -> Tensor:
    """1 3 S S in [-1, 1]: smooth shapes with some grain, the same each time."""
    g = torch.Generator().manual_seed(0)
    picture = torch.zeros(1, 3, size, size)
    for cells in (3, 9, 27):
        noise = torch.randn(1, 3, cells, cells, generator=g)
        picture += F.interpolate(noise, size=(size, size), mode="bilinear", align_corners=False) / cells**0.5
    return (picture + 0.1 * torch.randn(picture.shape, generator=g)).tanh().to(like.device, like.dtype)
