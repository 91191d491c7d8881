"""The fast twins of the towers: the same calls and numbers, other operators underneath. For inference.

B batch  N tokens  P prefix tokens  D width  C output width  T nodes of a tree of texts  R rows
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.errors import ConfigError
from perception.kernels.fused import Operators, operators
from perception.kernels.linear import Late, PackedLinear, choose, finish, fold, pack
from perception.layers import LayerScale, Mlp
from perception.optimize import FastPart, Plan, Twin, check_device
from perception.rope import Rope, rope_2d
from perception_encoder.clip import CLIP
from perception_encoder.pooling import AttentionPool
from perception_encoder.protocol import Features
from perception_encoder.text import TextBlock, TextTransformer, check_tokens
from perception_encoder.vision import Block, VisionTransformer, check_layers, check_pixels, on_grid, stretch

T = TypeVar("T")
ROWS = 1600  # tokens that go through the blocks together: enough for the products, few enough for the caches
ROWS_PER_THREAD = 128
TEXTS = 256  # texts that make one tree
EXACT = 1  # blocks, from the first on, that int8 leaves alone: what they get wrong, all blocks after them pass on


def fast_clip(model: CLIP, plan: Plan) -> CLIP:
    """A CLIP of two fast towers. `plan` as `perception.optimize.optimize` makes it."""
    if not isinstance(model.vision, VisionTransformer):
        raise ConfigError(f"this CLIP's vision tower is a {type(model.vision).__name__}, which has no fast twin")
    mark = fingerprint_of(model, plan)
    vision, text = fast_vision(model.vision, plan), fast_text(model.text, plan)
    fast = FastClip(cast(Any, vision), cast(Any, text), model.preprocess, model.tokenize)
    fast.logit_scale = frozen(model.logit_scale)
    fast.source = model.source
    fast.fingerprint, fast.marked = mark, str(model.preprocess.fingerprint())
    return fast.eval()


def fast_vision(tower: VisionTransformer, plan: Plan) -> Any:
    """The twin for the device the tower lies on."""
    check_device(plan, tower.pos_embed.device)
    mark = fingerprint_of(tower, plan)
    if tower.pos_embed.device.type == "cuda":
        from perception_encoder import fast_cuda

        fast: Any = fast_cuda.fast_vision(tower, plan)
    else:
        fast = FastVision(tower, plan)
    fast.fingerprint, fast.marked = mark, str(tower.preprocess.fingerprint())
    return fast


def fast_text(text: TextTransformer, plan: Plan) -> Any:
    """Never rounded to 8 bits: short texts are cheap already, and become classifiers that judge every picture."""
    check_device(plan, text.pos_embed.device)
    if text.pos_embed.device.type == "cuda":
        from perception_encoder import fast_cuda

        return fast_cuda.fast_text(text, plan)
    return FastText(text, replace(plan, quantize=None))


class FastClip(Twin, CLIP):
    """A CLIP whose towers are fast twins."""


class FastVision(FastPart):
    """What VisionTransformer does, call for call: features, features of layers, the pooled embedding.

    Half-precision weights are computed with in float32 where that is faster; inputs and outputs keep their dtype.
    Raises ConfigError for an input that asks for a gradient, and where VisionTransformer does.
    """

    def __init__(self, tower: VisionTransformer, plan: Plan):
        super().__init__()
        config = tower.config
        self.config, self.width, self.patch_size = config, tower.width, tower.patch_size
        self.preprocess, self.source, self.fingerprint = tower.preprocess, tower.source, ""
        self.pos_embed = frozen(tower.pos_embed)
        self.class_token = None if tower.class_token is None else frozen(tower.class_token)
        make = Maker(plan, self.pos_embed, config.head_dim, rows=config.grid**2 + int(config.class_token))
        self.compute = make.compute
        with torch.no_grad():
            self.patch_embed = make.linear(tower.patch_embed.weight.flatten(1), None, exact=True)
            self.norm_pre = make.norm(tower.norm_pre)
            self.blocks = [make.block(block, exact=index < EXACT) for index, block in enumerate(tower.blocks)]
            self.norm_post = make.norm(tower.norm_post)
            self.pool = None if tower.pool is None else FastPool(tower.pool, make)
            project = getattr(tower.project, "weight", None)
            self.project = None if project is None else make.linear(project, None, rows=8, exact=True)
        self._tables: dict[tuple[int, int], tuple[Tensor, Rope]] = {}
        if not plan.keep:
            release(tower)

    @property
    def dtype(self) -> torch.dtype:
        return self.pos_embed.dtype

    def forward(self, pixels: Tensor) -> Features:
        """The last block's output, before the final norm."""
        return self.intermediates(pixels, [-1])[0]

    def intermediates(self, pixels: Tensor, layers: Sequence[int], *, norm: bool = False) -> list[Features]:
        """As VisionTransformer.intermediates."""
        self.check_inference(pixels)
        wanted = check_layers(layers, len(self.blocks))
        h, w = self.grid_of(pixels)
        found: dict[int, list[Tensor]] = {index: [] for index in wanted}
        with torch.no_grad():
            for some in self._split(pixels, h, w):
                for index, x in self._run(some, h, w, wanted):
                    found[index].append((self.norm_post(x) if norm else x).to(self.dtype))
            return [on_grid(joined(found[index]), h, w) for index in wanted]

    def pooled(self, pixels: Tensor) -> Tensor:
        """As VisionTransformer.pooled."""
        self.check_inference(pixels)
        if self.pool is None:
            raise ConfigError("this tower has no pooling head (PE-Lang and PE-Spatial have none); use its patches")
        h, w = self.grid_of(pixels)
        last, rows = len(self.blocks) - 1, []
        with torch.no_grad():
            for some in self._split(pixels, h, w):
                rows += [self.pool(self.norm_post(x)) for _, x in self._run(some, h, w, [last])]
            x = joined(rows)
            return (x if self.project is None else self.project(x)).to(self.dtype)

    def grid_of(self, pixels: Tensor) -> tuple[int, int]:
        """The h, w patch grid of a batch of pixels; ConfigError when they do not fit this tower."""
        return check_pixels(pixels, self.patch_size)

    def positions(self, h: int, w: int) -> Tensor:
        """P+h*w D, as VisionTransformer.positions."""
        return stretch(self.pos_embed, self.config.grid, h, w)

    def _split(self, pixels: Tensor, h: int, w: int) -> Sequence[Tensor]:
        if pixels.device.type != "cpu":
            return [pixels]
        tokens = h * w + int(self.class_token is not None)
        rows = max(ROWS, ROWS_PER_THREAD * torch.get_num_threads())
        return pixels.split(max(1, rows // tokens))

    def _run(self, pixels: Tensor, h: int, w: int, wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """The tokens after each wanted block: (index, B P+h*w D). They are the caller's to keep."""
        pos, rope = self._table(h, w)
        x = self.norm_pre(self._embed(pixels, pos, h, w))
        late: Tensor | None = None
        stop = max(wanted, default=-1)
        for index, block in enumerate(self.blocks[: stop + 1]):
            x, late = block(x, rope, late)
            if index in wanted:
                if late is not None:
                    x.add_(late)
                    late = None
                yield index, x.clone() if index < stop else x

    def _embed(self, pixels: Tensor, pos: Tensor, h: int, w: int) -> Tensor:
        p, P = self.patch_size, len(pos) - h * w
        pixels = pixels.to(self.dtype).to(self.compute)
        patches = pixels.unflatten(3, (w, p)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5)  # B h w 3 p p
        x = pos.new_empty(len(pixels), len(pos), self.width)
        torch.add(self.patch_embed(patches.flatten(3).flatten(1, 2)), pos[P:], out=x[:, P:])
        if P:
            x[:, :P] = pos[:P]
        return x

    def _table(self, h: int, w: int) -> tuple[Tensor, Rope]:
        """Positions (with the class token in its row) and angles of a grid: kept for the few sizes a program uses."""
        if (h, w) not in self._tables:
            if len(self._tables) >= 8:
                self._tables.clear()
            pos = self.positions(h, w).to(self.compute, copy=True)
            if self.class_token is not None:
                pos[0] += self.class_token.to(self.compute)
            rope = rope_2d(h, w, self.config.head_dim, prefix=len(pos) - h * w, device=pos.device)
            self._tables[h, w] = pos, rope
        return self._tables[h, w]


class FastText(FastPart):
    """What TextTransformer does. Each text is computed as far as its end, and a beginning shared by several texts once.

    Attention is causal and positions count from the start, so both are exact: texts become a tree whose nodes are
    their distinct beginnings. The last block is computed at the ends alone.
    """

    def __init__(self, text: TextTransformer, plan: Plan):
        super().__init__()
        self.config, self.width = text.config, text.width
        self.token_embed, self.pos_embed = frozen(text.token_embed.weight), frozen(text.pos_embed)
        make = Maker(plan, self.pos_embed, text.width // text.config.heads)
        self.compute = make.compute
        with torch.no_grad():
            *before, last = text.blocks
            self.blocks = [*map(make.text_block, before), make.last_block(last)]
            self.norm = make.norm(text.norm)
            self.project = make.linear(text.project.weight, None, exact=True)
        if not plan.keep:
            release(text)

    @property
    def dtype(self) -> torch.dtype:
        return self.pos_embed.dtype

    @torch.no_grad()  # ids carry no gradients
    def forward(self, tokens: Tensor) -> Tensor:
        check_tokens(tokens, self.config.context)
        out = self.pos_embed.new_empty(len(tokens), self.config.output_width)
        texts, lengths = trimmed(tokens)
        order = np.lexsort(texts.T[::-1])  # texts that begin alike become neighbours
        for start in range(0, len(order), TEXTS):
            some = order[start : start + TEXTS]
            out[torch.from_numpy(some).to(out.device)] = self._embed(tree_of(texts[some], lengths[some], out.device))
        return out

    def _embed(self, tree: "Tree") -> Tensor:
        x = F.embedding(tree.tokens, self.token_embed) + self.pos_embed[tree.depths]  # T D
        x = x.to(self.compute)
        late: Tensor | None = None
        blocks: list[Any] = self.blocks
        for block in blocks:
            x, late = block(x, tree, late)
        if late is not None:
            x.add_(late)
        return self.project(self.norm(x)).to(self.dtype)


@dataclass(frozen=True)
class Tree:
    """Sorted texts as the tree of their beginnings.

    tokens, depths  T, what each node adds and at which position
    path            T L int32, the nodes from the first token to each node; `lengths` T int32 of the L count
    ends            B, each text's last node
    """

    tokens: Tensor
    depths: Tensor
    path: Tensor
    lengths: Tensor
    ends: Tensor


def trimmed(tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """B n with -1 after each text's end (its highest id, first occurrence), and the lengths B."""
    ids = tokens.cpu().numpy()
    lengths = ids.argmax(axis=1) + 1
    return np.where(np.arange(ids.shape[1]) < lengths[:, None], ids, -1), lengths


def tree_of(texts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Tree:
    """The tree of texts B n that are sorted, so that each shares its longest known beginning with the one before it."""
    columns = np.arange(texts.shape[1])
    differs = np.ones_like(texts, dtype=bool)
    differs[1:] = texts[1:] != texts[:-1]
    shared = np.where(
        differs.any(axis=1), differs.argmax(axis=1), texts.shape[1]
    )  # B, tokens shared with the one before
    new = (columns >= shared[:, None]) & (columns < lengths[:, None])  # B n
    nodes = np.where(new, np.cumsum(new).reshape(new.shape) - 1, -1)
    nodes = np.maximum.accumulate(nodes, axis=0)  # a shared token is the node last made in its column
    row, depth = np.nonzero(new)  # T
    L = int(lengths.max(initial=1))

    def tensor(x: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device, dtype)

    return Tree(
        tokens=tensor(texts[row, depth]),
        depths=tensor(depth),
        path=tensor(np.maximum(nodes[row, :L], 0), torch.int32),
        lengths=tensor(depth + 1, torch.int32),
        ends=tensor(nodes[np.arange(len(texts)), lengths - 1]),
    )


class FastNorm:
    """A LayerNorm with the bias that the product before it left."""

    def __init__(self, norm: nn.LayerNorm, ops: Operators):
        self.norm, self.ops = norm, ops

    def __call__(self, x: Tensor, late: Tensor | None = None) -> Tensor:
        return self.ops.norm(x, self.norm, late)


class FastMlp:
    """x + fc2(gelu(fc1(norm x))); returns it with the bias it leaves to the next norm."""

    def __init__(self, fc1: PackedLinear, fc2: PackedLinear, ops: Operators):
        self.fc1, self.fc2, self.ops = fc1, fc2, ops

    def __call__(self, normed: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        fc1 = self.fc1.at(normed)
        hidden = fc1.gelu(normed) if fc1.gelu_inside else self.ops.gelu(*fc1.unfinished(normed))
        return self.fc2.accumulate(hidden, x)


class FastBlock:
    """A block of the vision tower. `x` is written over; `late` is a bias that it still lacks."""

    def __init__(
        self, norm1: FastNorm, qkv: PackedLinear, proj: PackedLinear, norm2: FastNorm, mlp: FastMlp, heads: int
    ):
        self.norm1, self.qkv, self.proj, self.norm2, self.mlp, self.heads = norm1, qkv, proj, norm2, mlp, heads

    def __call__(self, x: Tensor, rope: Rope, late: Tensor | None) -> tuple[Tensor, Tensor | None]:
        qkv, rest = self.qkv.unfinished(self.norm1(x, late))
        x, late = self.proj.accumulate(self.norm1.ops.attention(qkv, self.heads, rope, rest), x)
        return self.mlp(self.norm2(x, late), x)


class FastTextBlock:
    """A block of the text tower over the nodes of a tree."""

    def __init__(
        self, norm1: FastNorm, qkv: PackedLinear, proj: PackedLinear, norm2: FastNorm, mlp: FastMlp, heads: int
    ):
        self.norm1, self.qkv, self.proj, self.norm2, self.mlp, self.heads = norm1, qkv, proj, norm2, mlp, heads

    def __call__(self, x: Tensor, tree: Tree, late: Tensor | None) -> tuple[Tensor, Tensor | None]:
        D = x.shape[1]
        qkv, (bias, scale) = self.qkv.unfinished(self.norm1(x, late))
        q, kv = finish(qkv, Late(scale=scale)).split([D, 2 * D], dim=1)
        attended = self.norm1.ops.tree(q, kv, tree.path, tree.lengths, self.heads, bias)
        x, late = self.proj.accumulate(attended, x)
        return self.mlp(self.norm2(x, late), x)


class FastLastBlock:
    """The last block: keys and values of all nodes, everything else at the ends of the texts alone."""

    def __init__(
        self,
        norm1: FastNorm,
        q: PackedLinear,
        kv: PackedLinear,
        proj: PackedLinear,
        norm2: FastNorm,
        mlp: FastMlp,
        heads: int,
    ):
        self.norm1, self.q, self.kv, self.proj, self.norm2, self.mlp = norm1, q, kv, proj, norm2, mlp
        self.heads = heads

    def __call__(self, x: Tensor, tree: Tree, late: Tensor | None) -> tuple[Tensor, Tensor | None]:
        normed = self.norm1(x, late)
        kv = self.kv(normed)
        x, normed, path, lengths = (t[tree.ends] for t in (x, normed, tree.path, tree.lengths))
        x, late = self.proj.accumulate(self.norm1.ops.tree(self.q(normed), kv, path, lengths, self.heads, None), x)
        return self.mlp(self.norm2(x, late), x)


class FastPool:
    """AttentionPool with its constant query folded in: exact in real arithmetic.

    The query times the key projection is one vector a head, so no keys are computed (their bias adds the same to every
    token, which softmax does not see); and the values are projected after they are averaged.
    """

    def __init__(self, pool: AttentionPool, make: "Maker"):
        D, H = pool.probe.shape[-1], pool.heads
        (q, k, v), (q_bias, _, v_bias) = pool.qkv.weight.double().split(D), pool.qkv.bias.double().split(D)
        query = (q @ pool.probe.double().flatten() + q_bias).unflatten(0, (H, -1)) * (D // H) ** -0.5  # H head_dim
        self.query = torch.einsum("hd,hdk->hk", query, k.unflatten(0, (H, -1))).float()  # H D
        self.value, self.value_bias = v.unflatten(0, (H, -1)).transpose(1, 2).float(), v_bias.float()  # H D head_dim
        self.compute = make.compute
        self.proj = make.linear(pool.proj.weight, pool.proj.bias, rows=8, exact=True)
        self.norm, self.fc1, self.fc2 = (
            make.norm(pool.norm),
            make.linear(pool.mlp.fc1.weight, pool.mlp.fc1.bias, rows=8, exact=True),
            make.linear(pool.mlp.fc2.weight, pool.mlp.fc2.bias, rows=8, exact=True),
        )

    def __call__(self, tokens: Tensor) -> Tensor:  # B N D -> B D
        tokens = tokens.float()
        weights = (tokens @ self.query.T).softmax(dim=1)  # B N H
        mean = weights.transpose(1, 2) @ tokens  # B H D
        x = torch.bmm(mean.transpose(0, 1), self.value).transpose(0, 1).flatten(1) + self.value_bias  # B D
        x = self.proj(x.to(self.compute))
        return self.fc2(self.fc1.gelu(self.norm(x)), x)


class Maker:
    """Packs the parts of one tower.

    compute  the dtype it computes in: float32 for half-precision weights where the processor has nothing faster
    rows     of one input, which the products are chosen for
    """

    def __init__(self, plan: Plan, like: Tensor, head_dim: int, rows: int = 256):
        self.rows = rows
        self.quantize: Literal["int8"] | None = "int8" if plan.quantize else None
        self.keep = plan.keep
        self.compute = like.dtype
        if like.device.type == "cpu" and like.dtype != torch.float32 and choose(like.dtype) == "float32":
            self.compute = torch.float32
        self.ops = operators(self.compute, like.device, head_dim, build=plan.build)

    def linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None = None,
        *,
        rows: int | None = None,
        exact: bool = False,
    ) -> PackedLinear:
        weight, bias = fold(weight, bias, gain)
        quantize = None if exact else self.quantize
        rows, most = (rows, 0) if rows else (self.rows, ROWS if self.keep else 0)  # one layout where memory is short
        return pack(weight.to(self.compute), bias, dtype=self.compute, quantize=quantize, rows=rows, most=most)

    def norm(self, norm: nn.Module) -> Any:
        if not isinstance(norm, nn.LayerNorm):
            return norm
        twin = nn.LayerNorm(norm.normalized_shape, norm.eps, device="meta")
        twin.weight, twin.bias = (frozen(p.to(self.compute, copy=True)) for p in (norm.weight, norm.bias))
        return FastNorm(twin, self.ops)

    def mlp(self, mlp: Mlp, scale: nn.Module | None = None, *, exact: bool = False) -> FastMlp:
        fc1 = self.linear(mlp.fc1.weight, mlp.fc1.bias, exact=exact)
        return FastMlp(fc1, self.linear(mlp.fc2.weight, mlp.fc2.bias, gain_of(scale), exact=exact), self.ops)

    def block(self, block: Block, *, exact: bool = False) -> FastBlock:
        return self._done(
            block,
            FastBlock(
                self.norm(block.norm1),
                self.linear(block.attn.qkv.weight, block.attn.qkv.bias, exact=exact),
                self.linear(block.attn.proj.weight, block.attn.proj.bias, gain_of(block.ls1), exact=exact),
                self.norm(block.norm2),
                self.mlp(block.mlp, block.ls2, exact=exact),
                block.attn.heads,
            ),
        )

    def text_block(self, block: TextBlock) -> FastTextBlock:
        return self._done(
            block,
            FastTextBlock(
                self.norm(block.norm1),
                self.linear(block.attn.qkv.weight, block.attn.qkv.bias),
                self.linear(block.attn.proj.weight, block.attn.proj.bias),
                self.norm(block.norm2),
                self.mlp(block.mlp),
                block.attn.heads,
            ),
        )

    def last_block(self, block: TextBlock) -> FastLastBlock:
        D = block.attn.proj.in_features
        (q, kv), (q_bias, kv_bias) = (t.split([D, 2 * D]) for t in (block.attn.qkv.weight, block.attn.qkv.bias))
        return self._done(
            block,
            FastLastBlock(
                self.norm(block.norm1),
                self.linear(q, q_bias),
                self.linear(kv, kv_bias),
                self.linear(block.attn.proj.weight, block.attn.proj.bias),
                self.norm(block.norm2),
                self.mlp(block.mlp),
                block.attn.heads,
            ),
        )

    def _done(self, block: nn.Module, fast: T) -> T:
        if not self.keep:
            release(block)  # block by block, so that both are never whole at once
        return fast


def gain_of(scale: nn.Module | None) -> Tensor | None:
    return scale.gamma if isinstance(scale, LayerScale) else None


def joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def frozen(parameter: Tensor) -> nn.Parameter:
    """The same memory as a parameter that is not trained."""
    return nn.Parameter(parameter.detach(), requires_grad=False)


def release(module: nn.Module) -> None:
    """Empty every parameter of a model that is not needed any more."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)


def fingerprint_of(model: nn.Module, plan: Plan) -> str:
    """The plain model's fingerprint; it says so when the twin rounds to 8 bits, and how."""
    from perception_encoder.retrieval.embed import fingerprint

    rounds = {None: "", "int8": "-int8", "int4": "-int8", "fp8": "-fp8"}  # a tower computes in 8 bits, never in 4
    return fingerprint(model) + rounds[plan.quantize]
