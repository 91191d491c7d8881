"""The fast twin of the decoder on a GPU, and writing ahead: whole decode steps, sampling included, as one graph.

B rows  T tokens  S slots  E decoder width  V vocabulary  K steps written ahead

    host     last tokens, lengths, K draws a row  ->                           ids B K, read back once
    device                                          step  step  step ... step
                                                    (each one launch; tokens, positions and draws stay there)
"""

import weakref
from collections.abc import Sequence
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.attention import attend
from perception.errors import LimitError
from perception.kernels.graphs import Graphs
from perception.kernels.triton.decode import attend_decode
from perception.kernels.triton.int4 import Product4, takes
from perception.kernels.triton.norm import rms_norm
from perception.kernels.triton.quantized import Code, Product, give_up, settle
from perception.kernels.triton.rotary import rotate_into_cache
from perception.kernels.triton.swiglu import swiglu
from perception.optimize import FastPart, Plan
from perception.rope import Rope, rope_1d
from perception_lm.cache import KVCache, Packed, Past
from perception_lm.decoder import Block, Decoder, RMSNorm, fresh, take, turn
from perception_lm.sampling import GenerationConfig, choose

if TYPE_CHECKING:
    from perception_lm.generation import Answer

AHEAD = 16  # steps between two looks at what was written
WATCHED = 4  # the same, when somebody reads along
ROOM = 512  # capacities are multiples of this, so that requests of different length share their graphs
FREE_ROOMS = 2  # kept for the next request
GRAPHS = 8  # ways of choosing a token, for which one room keeps a graph
Linear = Product | Product4


def fast_decoder(decoder: Decoder, plan: Plan) -> "CudaDecoder":
    """The twin of a decoder that lies on a GPU. `plan` as `perception.optimize.optimize` makes it."""
    fast = CudaDecoder(decoder)
    if plan.quantize == "int4":
        fast.round4(None if plan.keep else decoder)
    elif plan.quantize:
        fast.settle(fast.products, plan.quantize)
    if not plan.keep:
        give_up(decoder, [*fast.products, fast.head])
    return fast


class CudaDecoder(FastPart):
    """What Decoder does, call for call; its caches write ahead.

    Threads may share it, each with caches of its own, as far as they work on one stream, as they do unless told
    otherwise.
    """

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.config, self.width = decoder.config, decoder.width
        self.embedding = nn.Parameter(decoder.token_embed.weight.detach(), requires_grad=False)
        self.blocks = [CudaBlock(block) for block in decoder.blocks]
        self.norm = Norm(decoder.norm)
        self.head = Product(self.embedding if decoder.head is None else decoder.head.weight.detach())
        self.rooms: list[Room] = []
        self._table: Rope | None = None
        self.lock = RLock()  # over which room is whose, and over the table of angles and the graphs that read it

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

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
        return self.logits(self.hidden(x, cache, positions=positions, mask=mask, last=last))

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
            x = x.contiguous()
            past = fresh(x, positions, mask) if cache is None else cache.past(x.shape[1])
            if len(x) != len(past.positions):
                raise ValueError(f"{len(x)} rows of tokens were given with a cache for {len(past.positions)}")
            if isinstance(cache, KVCache) and type(cache) in (KVCache, RoomCache) and cache.keys[0].dtype == x.dtype:
                x = self._keep(x, cache, past.positions, past.mask, max(cache.lengths, default=0))
            else:
                x = self._remember(x, past)
            return self.norm(take(x, last).contiguous())

    def logits(self, x: Tensor) -> Tensor:
        """What `hidden` gives to logits: B k E -> B k V"""
        with torch.no_grad():
            return self.head(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """B T int64 -> B T E"""
        return F.embedding(tokens, self.embedding)

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache beside the weights; in their dtype it lies in a room that has its graphs already, if any."""
        dtype = dtype or self.dtype
        if dtype != self.dtype or not batch:
            c = self.config
            return KVCache(
                batch,
                capacity,
                depth=c.depth,
                kv_heads=c.kv_heads,
                head_dim=c.head_dim,
                device=self.device,
                dtype=dtype,
            )
        with self.lock:
            return self._room(batch, capacity).cache(self, capacity)

    def round4(self, emptied: Decoder | None = None) -> None:
        """Four bits for the products of the blocks, and eight for the head where they do it no harm: it chooses among
        close calls.

        emptied  the plain decoder, whose blocks are given up one by one, so that both never fill the memory together;
                 it stays whole when not given
        """
        with torch.no_grad():
            for index, block in enumerate(self.blocks):
                block.round4()
                if emptied is not None:
                    give_up(emptied.blocks[index], block.products)
        self.settle([self.head], "int8")

    @property
    def products(self) -> list[Linear]:
        """Those of the blocks."""
        return [product for block in self.blocks for product in block.products]

    def settle(self, given: Sequence[Linear], code: Code) -> list[float]:
        """Eight bits for those products that harm neither them nor the logits: the cosine of each, on made-up
        tokens."""
        products = [product for product in given if isinstance(product, Product)]
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.vocab, (1, min(256, self.config.context)), generator=g)
        with torch.no_grad():
            return settle(products, lambda: self.forward(self.embed(ids.to(self.device))), code)

    def step(self, tokens: Tensor, memory: "KVCache | Room", positions: Tensor) -> Tensor:
        """One token a row at its position, nothing read back: tokens B, positions B -> logits B 1 V."""
        return self.head(self.norm(self._keep(self.embed(tokens[:, None]), memory, positions[:, None], None, 0)))

    def _remember(self, x: Tensor, past: Past) -> Tensor:
        """The blocks with any kind of memory."""
        rope = rope_1d(
            past.positions.flatten(),
            self.config.head_dim,
            theta=self.config.rope_theta,
            scaling=self.config.rope_scaling,
        )
        x, owed = x.clone(), None
        for layer, block in enumerate(self.blocks):
            qkv = block.project(x, owed)
            q, k, v = qkv.split([block.heads, block.kv_heads, block.kv_heads], dim=2)
            attended = past.attend(layer, turn(q.contiguous(), rope), turn(k.contiguous(), rope), v)
            owed = block.finish(x, attended.flatten(2))
        return x if owed is None else x + owed

    def _keep(self, x: Tensor, memory: "KVCache | Room", positions: Tensor, mask: Tensor | None, end: int) -> Tensor:
        """The blocks, with keys and values written straight into their slots.

        end  slots that any row has used; a single token needs none, it sees as far as its own position
        """
        table = self._angles(memory.keys[0].shape[1])
        x, owed = x.clone(), None
        for layer, block in enumerate(self.blocks):
            keys, values = memory.keys[layer], memory.values[layer]
            q = rotate_into_cache(block.project(x, owed), table, positions, keys, values, block.heads)
            if x.shape[1] == 1:
                attended = attend_decode(q[:, 0], keys, values, positions[:, 0] + 1)[:, None]
            else:
                attended = attend(q, keys[:, :end], values[:, :end], causal=mask is None, mask=mask)
            owed = block.finish(x, attended.flatten(2))
        return x if owed is None else x + owed

    def _angles(self, capacity: int) -> Rope:
        """The table of at least `capacity` positions. Graphs read it where it lies: a longer one ends theirs."""
        with self.lock:
            if self._table is None or len(self._table[0]) < capacity:
                for room in self.rooms:
                    room.graphs.clear()
                c = self.config
                length = max(capacity, min(c.context, 16_384))
                places = torch.arange(length, device=self.device)
                self._table = rope_1d(places, c.head_dim, theta=c.rope_theta, scaling=c.rope_scaling)
            return self._table

    def _room(self, batch: int, capacity: int) -> "Room":
        """A room that is free, or a new one; the free ones used longest ago are given up. Under the lock, until it has
        its guest."""
        size = -(-max(capacity, 1) // ROOM) * ROOM
        room = next((r for r in self.rooms if r.free and (r.batch, r.size) == (batch, size)), None)
        if room is None:
            with torch.inference_mode(False):  # it outlives the request that asks for it
                room = Room(self, batch, size)
        else:
            self.rooms.remove(room)
        free = [r for r in self.rooms if r.free]
        gone = free[: max(len(free) - FREE_ROOMS + 1, 0)]
        self.rooms = [r for r in self.rooms if not any(r is g for g in gone)] + [room]
        return room


class Room:
    """Memory that outlives the requests that use it, one at a time, and the graphs recorded in it."""

    def __init__(self, decoder: CudaDecoder, batch: int, size: int):
        c, device = decoder.config, decoder.device
        self.batch, self.size = batch, size
        shape = (batch, size, c.kv_heads, c.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=decoder.dtype) for _ in range(c.depth)]
        self.values = [torch.zeros(shape, device=device, dtype=decoder.dtype) for _ in range(c.depth)]
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, dtype=torch.int64, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # which of the K steps this is
        self.draws = torch.zeros(batch, AHEAD, device=device)
        self.ids = torch.zeros(batch, AHEAD, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(batch, AHEAD, device=device)
        self.seen: Tensor | None = None  # B V, of requests with a penalty
        self.graphs = Graphs(GRAPHS)
        self.table: Rope | None = None  # what the graph that runs reads, though other threads ask for a longer one
        self._guest: weakref.ref[RoomCache] | None = None

    @property
    def free(self) -> bool:
        return self._guest is None or self._guest() is None

    def cache(self, decoder: CudaDecoder, capacity: int) -> "RoomCache":
        """An empty cache in this room, which is free again when nobody holds the cache any more."""
        if self._guest is not None:
            for memory in self.keys + self.values:
                memory.zero_()  # a slot that is masked counts 0 times its value, which may have been NaN
        cache = RoomCache(decoder, self, capacity)
        self._guest = weakref.ref(cache)
        return cache

    def write(
        self,
        decoder: CudaDecoder,
        lengths: Sequence[int],
        rows: Sequence["Answer"],
        config: GenerationConfig,
        count: int,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """`count` steps after `lengths` tokens; the ids and log-probabilities they chose, B lists each."""
        key = (
            *(config.temperature, config.top_k, config.top_p, config.min_p, config.logprobs),
            config.repetition_penalty if config.penalised else None,
        )
        if config.penalised and self.seen is None:
            with torch.inference_mode(False):
                self.seen = torch.zeros(self.batch, decoder.config.vocab, dtype=torch.bool, device=self.tokens.device)
        self._set(lengths, rows, config, count)  # first, for recording runs the steps for real: where nothing is yet
        with decoder.lock:
            self.table = decoder._angles(self.size)  # before the graph, which only reads it
            graph = self.graphs.of(key, lambda: self._step(decoder, config), device=self.tokens.device)
        self._set(lengths, rows, config, count)
        for _ in range(count):
            graph()
        return self.ids[:, :count].tolist(), self.logprobs[:, :count].tolist()

    def _set(self, lengths: Sequence[int], rows: Sequence["Answer"], config: GenerationConfig, count: int) -> None:
        self.tokens.copy_(torch.tensor([row.tokens[-1] for row in rows]))
        self.positions.copy_(torch.tensor(lengths))
        self.draws[:, :count] = torch.tensor([row.draws.peek(count) for row in rows]).to(self.draws)
        self.at.zero_()
        if config.penalised and self.seen is not None:
            self.seen.copy_(torch.stack([row.seen(self.seen) for row in rows]))

    def _step(self, decoder: CudaDecoder, config: GenerationConfig) -> tuple[Tensor, ...]:
        """Everything from one token to the next, on the device."""
        logits = decoder.step(self.tokens, self, self.positions)
        draws = self.draws.index_select(1, self.at)  # B 1
        seen = self.seen if config.penalised else None
        found, likely = choose(logits, config, draws, seen)  # B 1, -1 where the logits are not numbers
        chosen = found.clamp(min=0)
        if seen is not None:
            seen.scatter_(1, chosen, True)
        self.ids.index_copy_(1, self.at, found)
        self.logprobs.index_copy_(1, self.at, likely)
        self.tokens.copy_(chosen[:, 0])
        self.positions.add_(1)
        self.at.add_(1)
        return ()


class RoomCache(KVCache):
    """A `KVCache` whose memory is a room's, and which can write ahead."""

    def __init__(self, decoder: CudaDecoder, room: Room, capacity: int):
        self.decoder, self.room = decoder, room
        self.batch, self.capacity, self.lengths = room.batch, capacity, [0] * room.batch
        self.keys, self.values = room.keys, room.values

    @torch.inference_mode()
    def ahead(self, rows: Sequence["Answer"], config: GenerationConfig) -> list[list[tuple[int, float]]]:
        """Several steps without a look from outside: the tokens chosen with their log-probabilities, of each answer.

        None where an answer is finished. -1 for a token whose logits were not numbers. The cache holds all tokens that
        were fed; those that an answer does not take are for `crop`. Raises LimitError when there is no room.
        """
        live = [row for row in rows if row.finish is None]
        count = min(
            WATCHED if any(row.watched for row in live) else AHEAD,
            *(config.max_new_tokens - len(row.tokens) for row in live),
            1 + max(len(row.tokens) for row in live) // 2,  # so that short answers are not overshot by much
            self.capacity - max(self.lengths),
        )
        if count < 1:
            raise LimitError(f"{max(self.lengths) + 1} tokens do not fit into a cache of {self.capacity}")
        ids, logprobs = self.room.write(self.decoder, self.lengths, rows, config, count)
        self.lengths = [length + count for length in self.lengths]
        return [
            [] if row.finish else list(zip(chosen, likely, strict=True))
            for row, chosen, likely in zip(rows, ids, logprobs, strict=True)
        ]

    def _copy(self, rows: list[int], capacity: int) -> Any:
        new = self.decoder.new_cache(len(rows), capacity)
        new.lengths = [self.lengths[row] for row in rows]
        used = max(new.lengths, default=0)
        for ours, theirs in zip(new.keys + new.values, self.keys + self.values, strict=True):
            ours[:, :used] = theirs[rows, :used]
        return new


class CudaBlock:
    """A block with q, k, v as one product, and gate and up as another; `x` is written over.

    The fused weights take no memory of their own: the plain block's parameters become views of them.
    """

    def __init__(self, block: Block):
        c = block.attn
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        self.heads, self.kv_heads = c.q.out_features // c.head_dim, c.k.out_features // c.head_dim
        self.qkv: Linear = fused(c.q, c.k, c.v)
        self.gate_up: Linear = fused(block.mlp.gate, block.mlp.up)
        self.o: Linear = Product(c.o.weight.detach())
        self.down: Linear = Product(block.mlp.down.weight.detach())

    @property
    def products(self) -> list["Linear"]:
        return [self.qkv, self.o, self.gate_up, self.down]

    def round4(self) -> None:
        """Four bits for every product whose inputs come in groups."""
        self.qkv, self.o, self.gate_up, self.down = (
            Product4(p.weight) if isinstance(p, Product) and takes(p.weight) else p for p in self.products
        )

    def project(self, x: Tensor, owed: Tensor | None) -> Tensor:
        """B T E -> B T heads+2*kv_heads head_dim, after adding what the block before owes to x."""
        return self.qkv(self.norm1(x, owed)).unflatten(-1, (self.heads + 2 * self.kv_heads, -1))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block; returns what it owes to x."""
        return self.down(swiglu(self.gate_up(self.norm2(x, self.o(attended)))))


class Norm:
    """An RMSNorm that first adds what is owed to x."""

    def __init__(self, norm: RMSNorm):
        self.weight, self.eps = norm.weight.detach(), norm.eps

    def __call__(self, x: Tensor, owed: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps, owed)


@torch.no_grad()
def fused(*linears: nn.Linear) -> Product:
    """Maps of one input as one; each keeps its parameter, which becomes a part of the whole."""
    weight = torch.cat([linear.weight for linear in linears])
    for linear, part in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = part
    return Product(weight)
