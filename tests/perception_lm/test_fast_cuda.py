"""The decoder's twin for a GPU: the plain decoder's numbers, and whole answers written ahead, token for token."""

import copy
import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import plm_tiny
import pytest
import torch
from triton_here import DEVICE

from perception.checkpoint import write_safetensors
from perception.errors import ConfigError, LimitError, PerceptionError
from perception.kernels.graphs import Graph
from perception.kernels.matvec import round4, unround
from perception.kernels.triton import language
from perception.kernels.triton.int4 import Product4
from perception.optimize import Plan, Quantize
from perception_lm import fast_cuda
from perception_lm.cache import Packed
from perception_lm.decoder import Decoder
from perception_lm.fast_cuda import CudaDecoder, RoomCache, fast_decoder
from perception_lm.generation import Reply, generate, stream
from perception_lm.model import PerceptionLM
from perception_lm.processor import Batch


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No gradients, rooms no larger than the requests, and one thread for operations this small."""
    monkeypatch.setattr(fast_cuda, "ROOM", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' plain twins, where the kernels would be interpreted."""
    monkeypatch.setattr(language, "INTERPRETED", False)


def decoder_of(**sizes: Any) -> Decoder:
    return plm_tiny.tiny_model(plm_tiny.tiny_config(**sizes)).decoder.to(DEVICE)  # type: ignore[return-value]


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(400, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    error = torch.linalg.vector_norm(got - wanted, dim=-1) / torch.linalg.vector_norm(wanted, dim=-1)
    assert got.shape == wanted.shape
    assert float(error.max()) < 1e-5


def test_the_kernels_make_a_decoder() -> None:
    """A prompt of ragged rows, then a token each, through the kernels themselves."""
    decoder = decoder_of(depth=1)
    fast = fast_decoder(decoder, Plan())
    caches = [d.new_cache(2, 9) for d in (decoder, fast)]
    x = decoder.embed(text(2, 5))
    close(fast(x, caches[1]), decoder(x, caches[0]))
    for cache in caches:
        cache.crop([5, 3])
    x = decoder.embed(text(2, 1, seed=1))
    close(fast(x, caches[1], last=1), decoder(x, caches[0], last=1))


@pytest.mark.parametrize("tied", [True, False])
def test_the_same_logits(tied: bool, twins: None) -> None:
    """Without a cache, with one, in pieces, at positions and under masks of one's own, and where few are asked for."""
    decoder = decoder_of(tied=tied)
    fast = fast_decoder(decoder, Plan())
    ids = text(2, 7)
    x = fast.embed(ids)
    assert torch.equal(x, decoder.embed(ids))
    close(fast(x), decoder(x))
    close(fast(x, last=2), decoder(x, last=2))
    at = torch.tensor([[1], [4]], device=DEVICE)
    close(fast(x, last=at), decoder(x, last=at))
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2], device=DEVICE)
    mask = torch.ones(7, 7, dtype=torch.bool, device=DEVICE).tril()
    mask[4:, :4] = False
    close(fast(x, positions=positions, mask=mask), decoder(x, positions=positions, mask=mask))
    packed = Packed([3, 4], device=DEVICE)
    close(fast.hidden(x[:1], packed, last=3), decoder.hidden(x[:1], packed, last=3))
    caches = [d.new_cache(2, 12) for d in (decoder, fast)]
    for start, stop, kept in [(0, 4, [4, 2]), (4, 6, [6, 4]), (6, 7, [7, 5]), (0, 1, [8, 6])]:
        close(fast(x[:, start:stop], caches[1]), decoder(x[:, start:stop], caches[0]))
        for cache in caches:
            cache.crop(kept)
    rows = [1, 0, 1]
    again = [cache.select(rows).resized(20) for cache in caches]
    close(fast(x[rows, :3], again[1]), decoder(x[rows, :3], again[0]))


def test_a_cache_of_another_dtype(twins: None) -> None:
    decoder = decoder_of()
    fast = fast_decoder(decoder, Plan())
    x = decoder.embed(text(1, 4))
    caches = [d.new_cache(1, 8, dtype=torch.bfloat16) for d in (decoder, fast)]
    close(fast(x, caches[1]), decoder(x, caches[0]))
    assert caches[1].keys[0].dtype == torch.bfloat16


def test_the_plain_decoder_stays_as_it_is(twins: None, tmp_path: Path) -> None:
    """Its weights, where the twin reads several as one, are parts of one storage from then on; they save as before."""
    decoder = decoder_of(tied=False)
    saved = write_safetensors(tmp_path / "before", decoder.state_dict())
    before, parameters = copy.deepcopy(decoder.state_dict()), dict(decoder.named_parameters())
    x = decoder.embed(text(1, 4))
    wanted = decoder(x)
    fast = fast_decoder(decoder, Plan())
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in decoder.named_parameters())
    assert torch.equal(decoder(x), wanted)
    assert fast.blocks[0].qkv.weight.untyped_storage().data_ptr() == (
        decoder.blocks[0].attn.q.weight.untyped_storage().data_ptr()
    )
    assert write_safetensors(tmp_path / "after", decoder.state_dict()) == saved


def test_a_model_given_up(twins: None) -> None:
    decoder = decoder_of(width=64, heads=4, kv_heads=2, head_dim=16, mlp_width=128)
    x = decoder.embed(text(1, 4))
    wanted = decoder(x)
    for quantize, least in ((None, 0.99999), ("int8", 0.999)):
        given = copy.deepcopy(decoder)
        got = fast_decoder(given, Plan(quantize, keep=False))(x)  # type: ignore[arg-type]
        assert torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min() > least
        assert not any(parameter.numel() for parameter in given.parameters())


def batch_of(*lengths: int) -> Batch:
    ids = text(len(lengths), max(lengths), seed=sum(lengths)).cpu()
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
    return Batch(tokens=ids, pixels=None, lengths=list(lengths), media_counts=[0] * len(lengths))


@pytest.fixture
def models(twins: None) -> tuple[PerceptionLM, PerceptionLM]:
    plain = plm_tiny.tiny_model().to(DEVICE)
    fast = PerceptionLM(
        plain.encoder,
        plain.projector,
        fast_decoder(plain.decoder, Plan()),
        plain.media_token,  # type: ignore[arg-type]
    )
    return plain, fast


def words(ids: list[int]) -> str:
    return " ".join(map(str, ids))


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.9, "seed": 3},
    "cut": {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": [5, 6, 7]},
    "penalised": {"repetition_penalty": 1.7, "temperature": 0.7, "seed": 1},
    "penalised, greedy": {"repetition_penalty": 3.0},
    "logprobs": {"logprobs": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_written_ahead(models: tuple[PerceptionLM, PerceptionLM], name: str) -> None:
    """Token for token what the plain loop writes, ragged prompts, stops in between and all; twice, in the same room."""
    plain, fast = models
    batch = batch_of(9, 4, 6)
    settings = {"max_new_tokens": 23, **SETTINGS[name]}
    free = generate(plain, batch, words, **settings)
    stops = frozenset({free[1].tokens[5], free[2].tokens[14]})
    for stop_tokens in (frozenset(), stops):
        wanted = generate(plain, batch, words, stop_tokens=stop_tokens, **settings)
        for _ in range(2):
            assert same_replies(generate(fast, batch, words, stop_tokens=stop_tokens, **settings), wanted)


def same_replies(got: list[Reply], wanted: list[Reply]) -> bool:
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine.tokens, mine.text, mine.finish) == (theirs.tokens, theirs.text, theirs.finish)
        if theirs.logprobs is not None:
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    return True


def test_each_way_of_choosing_has_a_graph_of_its_own(models: tuple[PerceptionLM, PerceptionLM]) -> None:
    """One room, one setting after the other, and the first again: no graph is replayed for another setting."""
    plain, fast = models
    base = {"temperature": 1.2, "seed": 7, "max_new_tokens": 14}
    changes = [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {"temperature": 0.4}, {"logprobs": True}, {}]
    for change in [*changes, {"repetition_penalty": 2.0}, {"repetition_penalty": 1.1}]:
        settings = {**base, **change}
        wanted = generate(plain, batch_of(5), words, **settings)
        assert same_replies(generate(fast, batch_of(5), words, **settings), wanted)
    (room,) = fast.decoder.rooms
    assert len(room.graphs.kept) == fast_cuda.GRAPHS


def test_a_longer_table_of_angles_ends_the_graphs_that_read_the_old_one(
    models: tuple[PerceptionLM, PerceptionLM],
) -> None:
    plain, fast = models
    generate(fast, batch_of(5), words, max_new_tokens=4)
    (room,) = fast.decoder.rooms
    assert room.graphs.kept
    old = fast.decoder._table
    assert fast.decoder._angles(3) is old
    longer = fast.decoder._angles(len(old[0]) + 1)
    assert len(longer[0]) == len(old[0]) + 1
    assert not room.graphs.kept
    wanted = generate(plain, batch_of(5), words, max_new_tokens=4)
    assert same_replies(generate(fast, batch_of(5), words, max_new_tokens=4), wanted)


def test_few_looks(models: tuple[PerceptionLM, PerceptionLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer is looked at a few times, not at every token; a watched one more often."""
    _, fast = models
    counts: list[int] = []
    write = fast_cuda.Room.write

    def counted(room: Any, *given: Any) -> Any:
        counts.append(given[-1])
        return write(room, *given)

    monkeypatch.setattr(fast_cuda.Room, "write", counted)
    (reply,) = generate(fast, batch_of(5), words, max_new_tokens=60)
    assert sum(counts) == 59
    assert len(counts) <= 9
    assert all(count <= 1 + (1 + sum(counts[:i])) // 2 for i, count in enumerate(counts))  # a short one is not overshot
    counts.clear()
    pieces = list(stream(fast, batch_of(5), words, max_new_tokens=60))
    assert max(counts) == fast_cuda.WATCHED
    assert "".join(piece.text for piece in pieces) == reply.text


def test_recording_leaves_no_trace(twins: None) -> None:
    """A graph's first steps, run to record it, are not among those that are asked for: the same twice, all of them."""
    fast = fast_decoder(decoder_of(), Plan())
    cache = fast.new_cache(1, 32)
    fast(fast.embed(text(1, 4)), cache)
    row = type("Row", (), {"tokens": [3]})()
    row.draws = type("Draws", (), {"peek": lambda self, n: [0.5] * n})()
    written = [
        cache.room.write(fast, cache.lengths, [row], generation_config(), fast_cuda.AHEAD)  # type: ignore[list-item]
        for _ in range(2)
    ]
    assert written[0] == written[1]
    assert len(written[0][0][0]) == fast_cuda.AHEAD


def test_samples_and_guesses(models: tuple[PerceptionLM, PerceptionLM]) -> None:
    plain, fast = models
    for settings in ({"samples": 2, "temperature": 1.0, "seed": 4}, {"speculative": 3}, {"cache": False}):
        settings = {"max_new_tokens": 12, **settings}
        wanted = generate(plain, batch_of(5, 3), words, **settings)
        assert same_replies(generate(fast, batch_of(5, 3), words, **settings), wanted)


def test_a_step_records_whole(twins: None) -> None:
    """What a graph keeps is the operations alone: recorded at one token and place, replayed at another."""
    from torch.fx.experimental.proxy_tensor import make_fx

    if DEVICE == "cuda":
        pytest.skip("graphs themselves are recorded on a GPU")
    decoder = decoder_of(depth=1)
    fast = fast_decoder(decoder, Plan())
    caches = [d.new_cache(2, 16) for d in (decoder, fast)]
    x = decoder.embed(text(2, 6))
    decoder(x, caches[0])
    fast(x, caches[1])
    room = caches[1].room
    fast._angles(room.size)
    recorded = make_fx(lambda tokens, positions: fast.step(tokens, room, positions))(
        torch.tensor([1, 2]), torch.tensor([0, 1])
    )
    caches[1].crop([0, 0])
    fast(x, caches[1])  # what the recording wrote is written over
    for cache in caches:
        cache.crop([6, 3])
    tokens = text(2, 1, seed=9)
    got = recorded(tokens[:, 0], torch.tensor([6, 3]))
    close(got, decoder(decoder.embed(tokens), caches[0]))


def test_rooms_are_used_again(twins: None) -> None:
    """By one cache at a time, clean, and not without end."""
    fast = fast_decoder(decoder_of(), Plan())
    first = fast.new_cache(1, 10)
    second = fast.new_cache(1, 10)
    assert isinstance(first, RoomCache)
    assert first.room is not second.room
    room = first.room
    second.keys[1].fill_(3)
    first.keys[0].fill_(float("nan"))
    del first
    gc.collect()
    third = fast.new_cache(1, 14)
    assert third.room is room
    assert not third.keys[0].isnan().any()
    assert third.capacity == 14
    for batch in range(2, 8):
        fast.new_cache(batch, 10)
    assert len(fast.rooms) <= 2 + fast_cuda.FREE_ROOMS + 1
    assert any(r is room for r in fast.rooms)


def test_threads_share_a_decoder(models: tuple[PerceptionLM, PerceptionLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is written in a room of its own, though all ask for one of the same size, and free ones wait."""
    plain, fast = models
    taken, cache = [], fast_cuda.Room.cache

    def slowly(room: Any, *given: Any) -> Any:
        time.sleep(0.01)  # long enough for others to come in between
        taken.append(room)
        return cache(room, *given)

    lengths = [3, 5, 7, 9, 4, 6]
    wanted = [generate(plain, batch_of(length), words, max_new_tokens=9) for length in lengths]
    generate(fast, batch_of(5), words, max_new_tokens=9)
    gc.collect()
    monkeypatch.setattr(fast_cuda.Room, "cache", slowly)
    with ThreadPoolExecutor(6) as threads:
        held = list(threads.map(lambda _: fast.decoder.new_cache(1, 16), range(4)))
        assert len({id(room) for room in taken}) == len(held) == 4
        found = list(threads.map(lambda n: generate(fast, batch_of(n), words, max_new_tokens=9), lengths))
    for mine, theirs in zip(found, wanted, strict=True):
        assert same_replies(mine, theirs)


def test_a_longer_table_leaves_an_answer_that_is_being_written_its_own(
    models: tuple[PerceptionLM, PerceptionLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another request asks for more angles between two steps; what the steps read lies where it lay."""
    plain, fast = models
    decoder, step, seen = fast.decoder, Graph.__call__, []

    def interrupted(graph: Any, *inputs: Any) -> Any:
        (room,) = decoder.rooms
        decoder._angles(len(decoder._table[0]) + 1)
        seen.append(room.table is not None and room.table is not decoder._table)
        return step(graph, *inputs)

    monkeypatch.setattr(Graph, "__call__", interrupted)
    wanted = generate(plain, batch_of(5), words, max_new_tokens=6)
    assert same_replies(generate(fast, batch_of(5), words, max_new_tokens=6), wanted)
    assert seen
    assert all(seen)


def test_logits_that_are_no_numbers(models: tuple[PerceptionLM, PerceptionLM]) -> None:
    _, fast = models
    cache = fast.decoder.new_cache(1, 8)
    row = type("Row", (), {"tokens": [3], "finish": None, "watched": False})()
    row.draws = type("Draws", (), {"peek": lambda self, n: [0.5] * n})()
    fast.decoder.norm.weight = fast.decoder.norm.weight * float("nan")
    found = cache.ahead([row], generation_config())
    assert found == [[(-1, 0.5)]]
    with pytest.raises(PerceptionError, match="not finite numbers"):
        generate(fast, batch_of(3), words, max_new_tokens=4)


def generation_config() -> Any:
    from perception_lm.sampling import GenerationConfig

    return GenerationConfig(max_new_tokens=5)


def test_no_room(twins: None) -> None:
    fast = fast_decoder(decoder_of(), Plan())
    cache = fast.new_cache(1, 2)
    fast(fast.embed(text(1, 2)), cache)
    row = type("Row", (), {"tokens": [3], "finish": None, "watched": False})()
    with pytest.raises(LimitError, match="3 tokens do not fit into a cache of 2"):
        cache.ahead([row], generation_config())


@pytest.mark.parametrize("code", ["int8", "fp8"])
def test_eight_bits(code: Quantize, twins: None) -> None:
    decoder = decoder_of(width=64, heads=4, kv_heads=2, head_dim=16, mlp_width=128)
    x = decoder.embed(text(1, 4))
    wanted = decoder(x)
    fast = fast_decoder(decoder, Plan(quantize=code))
    coded = [product.code for product in fast.products].count(code)
    assert coded == 8 if code == "int8" else 0 < coded < 8  # the gate of the whole sends some back
    got = fast(x)
    assert not torch.equal(got, wanted)
    # Of each token; the gate holds the mean of many to 0.999, and 0.995 in fp8, which rounds to four bits.
    least = {"int8": 0.999, "fp8": 0.995}[code]
    assert torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min() > least


def test_four_bits(twins: None) -> None:
    """The blocks in four bits, rounded as on every device, the head in eight; a prompt and single tokens alike."""
    decoder = decoder_of(width=64, heads=4, kv_heads=2, head_dim=16, mlp_width=128, vocab=688, tied=False)
    x, rounded = decoder.embed(text(1, 20)), copy.deepcopy(decoder)
    for block in rounded.blocks:
        attn, mlp = block.attn, block.mlp
        for linear in (attn.q, attn.k, attn.v, attn.o, mlp.gate, mlp.up, mlp.down):
            linear.weight.copy_(unround(*round4(linear.weight, 64)))
    fast = fast_decoder(decoder, Plan(quantize="int4"))
    assert all(isinstance(product, Product4) for product in fast.products)
    close(fast.hidden(x), rounded.hidden(x))
    cache = fast.new_cache(1, 20)
    close(torch.cat([fast.hidden(part, cache) for part in x.split([17, 1, 1, 1], dim=1)], dim=1), rounded.hidden(x))
    assert fast.head.code == "int8"
    got = fast(x)
    assert 0.999 < torch.nn.functional.cosine_similarity(got, rounded(x), dim=-1).min() < 0.9999999


@pytest.mark.parametrize("tied", [True, False])
def test_four_bits_of_a_model_given_up(tied: bool, twins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, and the head, so that no weight is held twice; the embedding stays, tied or not."""
    decoder = decoder_of(width=64, heads=4, kv_heads=2, head_dim=16, mlp_width=128, vocab=688, tied=tied)
    x = decoder.embed(text(1, 20))
    wanted = fast_decoder(copy.deepcopy(decoder), Plan("int4"))(x)
    left: list[list[int]] = []
    round_block = fast_cuda.CudaBlock.round4

    def watched(block: Any) -> None:
        left.append([sum(p.numel() for p in plain.parameters()) for plain in decoder.blocks])
        round_block(block)

    monkeypatch.setattr(fast_cuda.CudaBlock, "round4", watched)
    whole = sum(p.numel() for p in decoder.blocks[0].parameters())
    fast = fast_decoder(decoder, Plan("int4", keep=False))
    assert left == [[whole, whole], [0, whole]]
    assert not any(parameter.numel() for parameter in decoder.parameters())
    assert fast.head.code == "int8"
    assert fast.head.weight.numel() == 0
    assert torch.equal(fast(x), wanted)
    assert torch.equal(fast.embed(text(1, 20)), x)


def test_four_bits_where_no_group_divides_the_inputs(twins: None) -> None:
    decoder = decoder_of()  # 40 wide: no multiple of 32
    fast = fast_decoder(decoder, Plan(quantize="int4"))
    assert not any(isinstance(product, Product4) for product in fast.products)
    close(fast.hidden(x := decoder.embed(text(1, 4))), decoder.hidden(x))


def test_refusals(twins: None) -> None:
    fast = CudaDecoder(decoder_of())
    with torch.enable_grad(), pytest.raises(ConfigError, match="no gradients"):
        fast(torch.zeros(1, 2, fast.width, device=DEVICE, requires_grad=True))
    with pytest.raises(LimitError, match="do not fit into a cache"):
        fast(fast.embed(text(1, 3)), fast.new_cache(1, 2))
    with pytest.raises(ValueError, match="2 rows of tokens were given with a cache for 1"):
        fast(fast.embed(text(2, 1)), fast.new_cache(1, 2))
