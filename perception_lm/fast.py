"""The fast twins of the language model: the same calls and numbers, other operators underneath. For inference.

B batch  T tokens  S slots  R = B * T rows  M media items  E decoder width  V vocabulary

    few rows, our own cache, compiled kernels     one call a block (perception/kernels/cpu/decode.cpp)
    anything else                                 torch's operators around the same weights
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.errors import ConfigError
from perception.kernels.cpp import kernels
from perception.kernels.linear import pack
from perception.kernels.matvec import FEW, Panels4, Panels8, Rows, Streamed, stream, together
from perception.optimize import FastPart, Plan, Twin, check_device, optimize_part
from perception.rope import rope_1d
from perception_lm.cache import HeadCache, KVCache, Packed, Past
from perception_lm.decoder import Block, Decoder, fresh, take
from perception_lm.model import PerceptionLM
from perception_lm.projector import PixelShuffleProjector, PoolingProjector, pooled_tokens

if TYPE_CHECKING:
    from perception_lm.assistant import Assistant

POSITIONS = 512  # rotary tables grow by so many at the least
REMEMBERED = 2  # conversations whose beginning a fast assistant keeps


def fast_assistant(assistant: "Assistant", plan: Plan) -> "Assistant":
    """An assistant with a fast model, which remembers the pictures it was asked about last."""
    from perception_lm.assistant import Assistant

    fast = Assistant(optimize_part(assistant.model, plan), assistant.processor, assistant.tokenizer)
    fast.remember(REMEMBERED)
    return fast


def fast_plm(model: PerceptionLM, plan: Plan) -> PerceptionLM:
    """A PerceptionLM of fast parts. Another library's encoder or decoder stays as it is."""
    check_full(model)
    encoder, decoder = optimize_part(model.encoder, plan), optimize_part(model.decoder, plan)
    projector = model.projector
    if isinstance(projector, PoolingProjector | PixelShuffleProjector):
        projector = cast(Any, FastProjector(projector, plan))
    fast = FastPlm(encoder, projector, decoder, model.media_token, media_chunk=model.media_chunk)
    return fast.eval()


class FastPlm(Twin, PerceptionLM):
    """A PerceptionLM whose parts are fast twins."""


def fast_decoder(decoder: Decoder, plan: Plan) -> "FastDecoder | nn.Module":
    """The twin of a decoder, for the device it lies on."""
    check_full(decoder)
    device = decoder.token_embed.weight.device
    check_device(plan, device)
    if device.type == "cuda":
        from perception_lm import fast_cuda

        return fast_cuda.fast_decoder(decoder, plan)
    if device.type != "cpu":
        raise ConfigError(f"the decoder lies on {device}; fast twins of it are for CPUs and CUDA devices")
    return FastDecoder(decoder, plan)


def check_full(model: nn.Module) -> None:
    """ConfigError for weights that `perception_lm.quantize` has rounded already."""
    if any(hasattr(parameter, "__tensor_flatten__") for parameter in model.parameters()):
        raise ConfigError("the weights are quantised already; load the full ones and give optimize() quantize=")


class FastDecoder(FastPart):
    """What Decoder does, call for call. All is computed in float32, whatever the weights are kept in.

    logits come in float32; keys and values are kept in the dtype of the weights. Without quantisation the weights are
    the plain model's own, in the same memory, wherever compiled kernels run. Raises ConfigError for an input that asks
    for a gradient.
    """

    def __init__(self, decoder: Decoder, plan: Plan):
        super().__init__()
        self.config, self.width = decoder.config, decoder.width
        self.embedding = nn.Parameter(decoder.token_embed.weight.detach(), requires_grad=False)
        with torch.no_grad():
            self.blocks = [FastBlock(block, plan) for block in decoder.blocks]
            self.norm = decoder.norm.weight.detach().float()
            # the head chooses among close calls: 8 bits for it, where the blocks take 4
            head = self.embedding if decoder.head is None else decoder.head.weight
            self.head = stream(head, "int8" if plan.quantize else None, build=plan.build)
        every = [self.head, *(weight for block in self.blocks for weight in block.weights)]
        self.compiled = kernels(plan.build) is not None and all(type(w) in (Rows, Panels8, Panels4) for w in every)
        self._rope = torch.empty(2, 0, decoder.config.head_dim // 2)
        if not plan.keep:
            release(decoder)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def nbytes(self) -> int:
        """What one token reads of the weights."""
        return sum(w.nbytes for block in self.blocks for w in block.weights) + self.head.nbytes

    def forward(
        self,
        x: Tensor,
        cache: KVCache | Packed | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        last: int | Tensor | None = None,
    ) -> Tensor:
        """As Decoder.forward."""
        self.check_inference(x)
        with torch.no_grad():
            x = take(self._run(x, cache, positions, mask), last)
            rows = x.reshape(-1, self.width).contiguous()
            if self.compiled and len(rows) <= FEW:
                eps, head = self.config.norm_eps, self.head
                y = torch.ops.perception.decoder_head(rows, self.norm, head.weight, head.scale, head.out_features, eps)
            else:
                y = self.head(self._normed(rows))
            return y.view(*x.shape[:-1], -1)

    def hidden(
        self,
        x: Tensor,
        cache: KVCache | Packed | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        last: int | Tensor | None = None,
    ) -> Tensor:
        """As Decoder.hidden."""
        self.check_inference(x)
        with torch.no_grad():
            return self._normed(take(self._run(x, cache, positions, mask), last))

    def logits(self, x: Tensor) -> Tensor:
        """What `hidden` gives to logits: B k E -> B k V"""
        with torch.no_grad():
            return self.head(x.reshape(-1, self.width)).view(*x.shape[:-1], -1)

    def embed(self, tokens: Tensor) -> Tensor:
        """B T int64 -> B T E"""
        return F.embedding(tokens, self.embedding)

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype | None = None) -> HeadCache:
        """An empty cache, in the dtype of the weights unless another is given."""
        c = self.config
        return HeadCache(
            batch,
            capacity,
            depth=c.depth,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            device=self.device,
            dtype=dtype or self.dtype,
        )

    def _run(self, x: Tensor, cache: Any, positions: Tensor | None, mask: Tensor | None) -> Tensor:
        """B T E -> B T E float32, the last block's output"""
        B, T = x.shape[:2]
        if cache is not None and cache.batch != B:
            raise ValueError(f"{B} rows of tokens were given with a cache for {cache.batch}")
        if self.compiled and isinstance(cache, HeadCache) and B * T <= FEW and cache.keys[0].dtype in KEPT:
            return self._step(x, cache)
        past = fresh(x, positions, mask) if cache is None else cache.past(T)
        cos, sin = self._table(int(past.positions.max()) + 1 if past.positions.numel() else 0)
        turn = torch.complex(cos, sin)[past.positions][:, :, None]  # B T 1 head_dim/2
        x = x.to(torch.float32, copy=True)
        for layer, block in enumerate(self.blocks):
            x = block(x, turn, past, layer, self.config.norm_eps)
        return x

    def _step(self, x: Tensor, cache: HeadCache) -> Tensor:
        """Few rows against our own cache: one compiled call a block."""
        rows = x.reshape(-1, self.width).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        places = cache.places(x.shape[1])
        cos, sin = self._table(cache.capacity)
        step, c = torch.ops.perception.decoder_block, self.config
        for block, (keys, values) in zip(self.blocks, cache.by_head, strict=True):
            step(
                rows,
                block.norm1,
                block.norm2,
                block.data,
                block.scales,
                keys,
                values,
                cos,
                sin,
                places,
                c.heads,
                c.mlp_width,
                c.norm_eps,
            )
        return rows.view(x.shape)

    def _normed(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.width,), self.norm, self.config.norm_eps)

    def _table(self, count: int) -> Tensor:
        """cos and sin of the positions below `count`, at least: 2 S head_dim/2 float32, kept and grown."""
        if self._rope.shape[1] < count:
            c, count = self.config, max(count, POSITIONS, 2 * self._rope.shape[1])
            rope = rope_1d(torch.arange(count), c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling)
            self._rope = torch.stack(rope)
        return self._rope


KEPT = (torch.float32, torch.bfloat16)  # dtypes of keys and values that compiled kernels read


class FastBlock:
    """x + attention(norm x), then x + mlp(norm x), all in float32.

    Compiled kernels take queries, keys and values in one call, and gate and up in another. Without them these maps are
    one where their weights are copied anyway (`together`); where the plain model's own memory serves, they stay apart.
    """

    def __init__(self, block: Block, plan: Plan):
        attn, mlp = block.attn, block.mlp
        self.head_dim = attn.head_dim
        self.outputs = [part.out_features for part in (attn.q, attn.k, attn.v)]
        self.hidden = [mlp.gate.out_features] * 2
        self.norm1, self.norm2 = block.norm1.weight.detach().float(), block.norm2.weight.detach().float()
        make = _maker(plan)
        self.qkv, self.o = make(attn.q, attn.k, attn.v), make(attn.o)
        self.gate_up, self.down = make(mlp.gate, mlp.up), make(mlp.down)
        self.weights = [*self.qkv, *self.o, *self.gate_up, *self.down]
        self.data, self.scales = [w.weight for w in self.weights], [w.scale for w in self.weights]

    def __call__(self, x: Tensor, turn: Tensor, past: Past, layer: int, eps: float) -> Tensor:
        """x B T E float32; turn B T 1 head_dim/2 complex"""
        B, T, E = x.shape
        h = F.rms_norm(x, (E,), self.norm1, eps).view(-1, E)
        q, k, v = (part.view(B, T, -1, self.head_dim) for part in applied(self.qkv, h, self.outputs))
        h = past.attend(layer, rotated(q, turn), rotated(k, turn), v)
        x = x + self.o[0](h.reshape(B * T, -1)).view(B, T, E)
        h = F.rms_norm(x, (E,), self.norm2, eps).view(-1, E)
        gate, up = applied(self.gate_up, h, self.hidden)
        return x.add_(self.down[0](F.silu(gate, inplace=True).mul_(up).contiguous()).view(B, T, E))


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """Neighbouring channels are one complex number.  x B T heads head_dim, turn B T 1 head_dim/2"""
    planes = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(planes * turn).flatten(-2)


def applied(maps: Sequence[Streamed], x: Tensor, outputs: list[int]) -> Sequence[Tensor]:
    """What maps of one input give, each R of its outputs, whether they are one or apart.  x R K"""
    return maps[0](x).split(outputs, dim=1) if len(maps) == 1 else [part(x) for part in maps]


def _maker(plan: Plan) -> Callable[..., list[Streamed]]:
    quantize = plan.quantize
    assert quantize != "fp8", "no CPU computes in it"

    def make(*linears: nn.Linear) -> list[Streamed]:
        maps = together([linear.weight for linear in linears], quantize, build=plan.build)
        if not plan.keep:
            for linear in linears:  # as soon as may be, so that both never fill the memory
                linear.weight.data = linear.weight.data.new_empty(0)
        return maps

    return make


class FastProjector(FastPart):
    """What PoolingProjector and PixelShuffleProjector do."""

    def __init__(self, projector: PoolingProjector | PixelShuffleProjector, plan: Plan):
        super().__init__()
        self.in_width, self.width, self.pool = projector.in_width, projector.width, projector.pool
        linears = [projector.fc] if isinstance(projector, PixelShuffleProjector) else [projector.fc1, projector.fc2]
        self.shuffle = isinstance(projector, PixelShuffleProjector)
        self.dtype = linears[0].weight.dtype
        with torch.no_grad():
            self.layers = [pack(linear.weight, linear.bias) for linear in linears]
        if not plan.keep:
            release(projector)

    def tokens(self, h: int, w: int) -> int:
        return pooled_tokens(h, w, self.pool)

    def forward(self, patches: Tensor) -> Tensor:
        """M h w D -> M n E"""
        self.check_inference(patches)
        h, w = patches.shape[1:3]
        n, p = self.tokens(h, w), self.pool
        with torch.no_grad():
            x = patches.to(self.dtype).unflatten(2, (w // p, p)).unflatten(1, (h // p, p)).transpose(2, 3)
            x = x.flatten(3, 4)  # M h/p w/p p*p D
            if self.shuffle:
                return self.layers[0](x.flatten(3)).flatten(1, 2)
            first, second = self.layers
            # the second map is linear: the mean of its results is its result of the mean, at 1/p^2 of the work
            return second(first.gelu(x.reshape(-1, self.in_width)).view(len(x), n, p * p, -1).mean(2))


def release(module: nn.Module) -> None:
    """Empty every parameter of a model that is not needed any more."""
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
