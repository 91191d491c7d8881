"""The fast twins of decoder, model and assistant: the plain path's numbers, and its answers token for token."""

import copy
import dataclasses

import plm_golden as golden
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perception.errors import ConfigError, LimitError, PerceptionError
from perception.kernels import matvec
from perception.kernels.cpp import kernels
from perception.optimize import optimize
from perception_lm import fast as fast_parts
from perception_lm.assistant import Assistant
from perception_lm.cache import HeadCache, Packed
from perception_lm.config import DecoderConfig
from perception_lm.decoder import Decoder
from perception_lm.fast import FastDecoder, FastProjector
from perception_lm.generation import generate, score, stream
from perception_lm.memory import Memory
from perception_lm.model import PerceptionLM
from perception_lm.projector import PixelShuffleProjector, PoolingProjector
from perception_lm.quantize import weight_bytes
from perception_lm.samples import samples
from perception_lm.sampling import GenerationConfig
from perception_lm.zoo import load

FORMS = {"int8": {matvec.Panels8, matvec.Torch8}, "int4": {matvec.Panels4, matvec.Torch4}}
SHORT = GenerationConfig(max_new_tokens=8)
MIDDLE = DecoderConfig(width=192, depth=3, heads=6, kv_heads=2, mlp_width=384, vocab=300, tied=True, context=600)


@pytest.fixture(params=["compiled", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With compiled kernels, and as on a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(matvec, "kernels", lambda build: None)
        monkeypatch.setattr(fast_parts, "kernels", lambda build: None)
    elif kernels() is None:
        pytest.skip("no C++ compiler here")
    else:  # whichever is faster on this machine
        monkeypatch.setattr(matvec, "compiled", lambda kind, build: True)
    return request.param


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, of the worst token."""
    assert found.shape == wanted.shape
    return float(((found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)).max())


def middle(dtype: torch.dtype = torch.float32) -> tuple[Decoder, Tensor]:
    """A decoder wide enough to be rounded, and 30 embeddings for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Decoder(MIDDLE).eval().to(dtype), torch.randn(2, 30, 192).to(dtype)


def pieces(decoder: FastDecoder, x: Tensor, sizes: list[int]) -> Tensor:
    cache = decoder.new_cache(len(x), sum(sizes))
    x = x.transpose(0, 1).contiguous().transpose(0, 1)  # rows need not lie end to end
    return torch.cat([decoder(part, cache) for part in x.split(sizes, dim=1)], dim=1)


def check_margins(
    plain: PerceptionLM, fast: PerceptionLM, ids: Tensor, media: Tensor | None, answer: list[int], off: float
) -> int:
    """No logit is off by more than `off`, and each token is the likeliest by the plain path, or less than twice that
    behind it: a close call may go either way. Returns how many were none.
    """
    tokens = torch.cat([ids, torch.tensor([answer[:-1]])], dim=1)
    with torch.inference_mode():
        logits, found = (model(tokens, media, last=len(answer))[0].float() for model in (plain, fast))
    assert float((found - logits).abs().max()) <= off
    behind = logits.amax(-1) - logits[range(len(answer)), answer]
    assert float(behind.max()) <= 2 * off
    first, second = logits.topk(2).values.unbind(-1)
    return int((first - second > 2 * off).sum())


# --- Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.MODELS)
@torch.inference_mode()
def test_float32_equals_the_plain_path(name: str, form: str) -> None:
    plain = golden.load(name)
    fast = optimize(plain)
    assert fast.decoder.compiled == (form == "compiled")
    for case in ("one", "multi", "text"):
        b = golden.batch(name, [case])
        wanted = plain(b.tokens, b.pixels)
        assert error(fast(b.tokens, b.pixels), wanted) < 1e-5
        assert error(pieces(fast.decoder, fast.embed(b.tokens, b.pixels), [7, 1, b.lengths[0] - 8]), wanted) < 1e-5


@torch.inference_mode()
def test_bfloat16_is_close_to_float32(form: str) -> None:
    plain, x = middle(torch.bfloat16)
    exact = Decoder(MIDDLE).eval()
    exact.load_state_dict(plain.state_dict())  # the rounded weights, computed in float32
    wanted, fast = exact(x.float()), optimize(plain)
    for found in (fast(x), pieces(fast, x, [1] * 30)):
        assert found.dtype == torch.float32
        assert float(F.cosine_similarity(found, wanted, dim=-1).min()) > 0.9999


@pytest.mark.parametrize(("quantize", "least"), [("int8", 0.999), ("int4", 0.97)])
@torch.inference_mode()
def test_rounded_weights_stay_close(quantize: str, least: float, form: str) -> None:
    plain, x = middle()
    wanted, fast = plain(x), optimize(plain, quantize=quantize)
    few, many = pieces(fast, x, [1] * 30), fast(x)
    for found in (few, many):
        assert float(F.cosine_similarity(found, wanted, dim=-1).min()) > least
    assert error(few, many) < 0.05
    # compiled kernels take maps of one input in one call; torch's operators are given them as one
    assert {len(block.weights) for block in fast.blocks} == {7 if form == "compiled" else 4}
    blocks = sum(weight.nbytes for block in fast.blocks for weight in block.weights)
    full = sum(p.numel() for block in plain.blocks for p in block.parameters())
    assert blocks < full * (1.05 if quantize == "int8" else 0.7)


@torch.inference_mode()
def test_all_ways_of_calling_it(form: str) -> None:
    plain, x = middle()
    fast = optimize(plain)
    positions, mask = torch.arange(30) * 3, torch.rand(30, 30, generator=torch.Generator().manual_seed(0)) < 0.7
    mask |= torch.eye(30, dtype=torch.bool)
    ends = torch.tensor([[3, 29], [0, 7]])
    assert error(fast(x, positions=positions), plain(x, positions=positions)) < 1e-5
    assert error(fast(x, mask=mask), plain(x, mask=mask)) < 1e-5
    assert error(fast(x, last=ends), plain(x, last=ends)) < 1e-5
    assert error(fast(x, last=2), plain(x)[:, -2:]) < 1e-5
    assert error(fast(x, last=1), plain(x)[:, -1:]) < 1e-5
    assert error(fast.hidden(x), plain.hidden(x)) < 1e-5
    assert error(fast.logits(fast.hidden(x)), plain(x)) < 1e-5
    assert error(fast(x[:1], Packed([20, 10])), plain(x[:1], Packed([20, 10]))) < 1e-5
    other = plain.new_cache(2, 30)  # a plain cache serves, too
    assert error(torch.cat([fast(x[:, :29], other), fast(x[:, 29:], other)], dim=1), plain(x)) < 1e-5
    with pytest.raises(ValueError, match="2 rows of tokens were given with a cache for 1"):
        fast(x, fast.new_cache(1, 30))
    with pytest.raises(LimitError, match="do not fit into a cache of 29"):
        fast(x[:, :1], filled(fast, x))


def filled(decoder: FastDecoder, x: Tensor) -> HeadCache:
    cache = decoder.new_cache(2, 29)
    decoder(x[:, :29], cache)
    return cache


@torch.inference_mode()
def test_ragged_rows_equal_singles(form: str) -> None:
    plain, x = middle()
    fast, lengths = optimize(plain), [25, 4]
    cache = fast.new_cache(2, 30)
    fast(x[:, :25], cache)
    cache.crop(lengths)
    cache = cache.select([1, 0, 1]).resized(40)
    more = x[[1, 0, 1], 25:28]
    found = torch.cat([fast(part, cache) for part in more.split([1, 2], dim=1)], dim=1)
    for row, source in enumerate([1, 0, 1]):
        alone = plain(torch.cat([x[source, None, : lengths[source]], more[row, None]], dim=1))
        assert error(found[row, None], alone[:, lengths[source] :]) < 1e-5
    assert isinstance(cache, HeadCache)
    assert cache.by_head[0][0].is_contiguous()


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler here")
@torch.inference_mode()
def test_long_contexts_are_shared_out_among_threads() -> None:
    plain, _ = middle()
    fast, x = optimize(plain), torch.randn(1, 590, 192, generator=torch.Generator().manual_seed(3))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = pieces(fast, x, [589, 1])
    finally:
        torch.set_num_threads(threads)
    assert error(found, plain(x)) < 1e-5


@pytest.mark.parametrize("kind", [PoolingProjector, PixelShuffleProjector])
@torch.inference_mode()
def test_projectors(kind: type) -> None:
    torch.manual_seed(0)
    plain = kind(12, 20, 2)
    patches = torch.randn(3, 4, 6, 12)
    fast = FastProjector(plain, fast_parts.Plan())
    assert error(fast(patches), plain(patches)) < 1e-5
    with pytest.raises(ConfigError, match="does not pool by 2"):
        fast(patches[:, :3])


# --- Answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.MODELS)
@pytest.mark.parametrize("settings", [{}, {"speculative": 3}, {"temperature": 0.8, "top_p": 0.9, "seed": 5}])
def test_answers_are_the_plain_ones(name: str, settings: dict) -> None:
    plain = golden.load(name)
    fast, cases = optimize(plain), ["one", "inter", "text"]
    batch = golden.batch(name, cases)
    wanted = [reply.tokens for reply in generate(plain, batch, golden.words, max_new_tokens=12, **settings)]
    found = [reply.tokens for reply in generate(fast, batch, golden.words, max_new_tokens=12, **settings)]
    assert found == wanted
    if not settings:
        assert found == [golden.greedy(name, case)[:12] for case in cases]
    streamed = list(stream(fast, batch[1], golden.words, max_new_tokens=12, **settings))
    assert [token for piece in streamed for token in piece.tokens] == generate(
        plain, batch[1], golden.words, max_new_tokens=12, **settings
    )[0].tokens


@pytest.mark.parametrize(("kind", "off"), [("bf16", 0.1), ("int8", 0.5), ("int4", 1.25)])
def test_rounded_answers_are_within_the_margin(kind: str, off: float) -> None:
    """PLM-nano's greedy tokens are those of float32 wherever these are ahead of the next ones by more than rounding
    moves two logits, and mostly they are. `off` is a little over what was measured, of logits that spread by 4."""
    plain = load("PLM-nano", device="cpu", dtype="float32")
    if kind == "bf16":
        fast = optimize(load("PLM-nano", device="cpu", dtype="bfloat16"))
    else:
        fast = optimize(plain, kind)
        assert {type(weight) for weight in fast.model.decoder.blocks[0].weights} <= FORMS[kind]
    clear, tokens = 0, 0
    for name in ("chart", "scene"):
        sample = samples()[name]
        picture = {"type": "image", "image": str(sample["path"])}
        messages = [{"role": "user", "content": [picture, {"type": "text", "text": sample["questions"][0][0]}]}]
        batch = plain.processor([messages])
        (reply,) = fast.generate([messages], max_new_tokens=24)
        clear += check_margins(plain.model, fast.model, batch.tokens, batch.pixels, reply.tokens, off)
        tokens += len(reply.tokens)
    assert clear > tokens // 2


def test_scores_and_cancel() -> None:
    plain = golden.load("A")
    fast, batch = optimize(plain), golden.batch("A", ["one", "text"])
    answers = [[[5, 6, 7], [8]], [[9, 10]]]
    found, wanted = score(fast, batch, answers), score(plain, batch, answers)
    for a, b in zip(found, wanted, strict=True):
        for c, d in zip(a, b, strict=True):
            assert c == pytest.approx(d, abs=1e-4)
    asked = iter([False, True])
    replies = generate(fast, batch, golden.words, max_new_tokens=9, cancel=lambda: next(asked))
    assert [(reply.finish, len(reply.tokens)) for reply in replies] == [("cancelled", 2)] * 2


def test_numbers_that_are_none_are_refused() -> None:
    plain = golden.load("B")
    plain.decoder.norm.weight.data[0] = float("nan")
    with pytest.raises(PerceptionError, match="not finite"):
        generate(optimize(plain), golden.batch("B", ["text"]), golden.words, max_new_tokens=2)


# --- What it is -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler here")
def test_the_plain_model_stays_and_lends_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matvec, "compiled", lambda kind, build: True)
    plain = golden.load("A")
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    fast = optimize(plain)
    assert fast.plain is plain
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())
    block, source = fast.decoder.blocks[0], plain.decoder.blocks[0]
    assert block.weights[0].weight.data_ptr() == source.attn.q.weight.data_ptr()
    assert fast.decoder.head.weight.data_ptr() == plain.decoder.token_embed.weight.data_ptr()


def test_keep_false_gives_up_the_plain_model(form: str) -> None:
    plain, x = middle()
    with torch.inference_mode():
        wanted = plain(x)
    fast = optimize(plain, keep=False)
    assert fast.plain is None
    assert weight_bytes(plain) == 0
    with torch.inference_mode():
        assert error(fast(x), wanted) < 1e-5


def test_what_a_fast_decoder_refuses() -> None:
    plain, x = middle()
    fast = optimize(plain)
    with pytest.raises(ConfigError, match="computes no gradients"):
        fast(x.requires_grad_())
    with pytest.raises(ConfigError, match="for inference"):
        fast.train()
    with pytest.raises(ConfigError, match="has no fast twin"):
        optimize(fast)

    class Rounded(torch.nn.Parameter):
        def __tensor_flatten__(self) -> None: ...

    plain.blocks[0].attn.q.weight = Rounded(plain.blocks[0].attn.q.weight.detach(), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised already"):
        optimize(plain)
    with pytest.raises(ConfigError, match="lies on meta"), torch.device("meta"):
        optimize(Decoder(MIDDLE))


# --- Memory -----------------------------------------------------------------------------------------------------------


def questions(first: int, second: int) -> tuple[list[int], list[int], Tensor]:
    """Two prompts that begin with the same picture."""
    _, media = golden.random_prompt(first, 1, 3)
    start = [3, 4] + [golden.SLOT] * golden.PER_ITEM
    a = [*start, *golden.random_prompt(first, 0, 5)[0]]
    return a, [*start, *golden.random_prompt(second, 0, 7)[0]], media


def ask(model: PerceptionLM, memory: Memory, ids: list[int], media: Tensor | None) -> tuple[list[int], int]:
    """The answer, and how many media were encoded for it."""
    batch, encoded, real = golden.pack([ids], [media]), 0, model.encode_media

    def counting(pixels: Tensor):
        nonlocal encoded
        encoded += len(pixels)
        return real(pixels)

    model.encode_media = counting  # type: ignore[method-assign]
    try:
        with memory.lent(model, batch, SHORT) as session:
            (reply,) = generate(model, batch, golden.words, SHORT, reuse=session)
    finally:
        del model.encode_media
    return reply.tokens, encoded


def test_a_second_question_starts_behind_the_picture() -> None:
    plain = golden.tiny()
    fast, memory = optimize(plain), Memory(2)
    first, second, media = questions(1, 2)
    wanted = [ask(plain, Memory(0), ids, media)[0] for ids in (first, second)]
    assert ask(fast, memory, first, media) == (wanted[0], 1)
    assert ask(fast, memory, second, media) == (wanted[1], 0)
    assert ask(fast, memory, first, media) == (wanted[0], 0)
    assert len(memory.sessions) == 1


def test_memory_is_bounded_and_each_picture_has_its_own() -> None:
    model, memory = golden.tiny(), Memory(2)
    prompts = [questions(seed, 9) for seed in (1, 2, 3)]
    for first, _, media in prompts:
        assert ask(model, memory, first, media)[1] == 1
    assert len(memory.sessions) == 2
    assert memory.nbytes > 0
    assert ask(model, memory, prompts[2][1], prompts[2][2])[1] == 0  # known
    assert ask(model, memory, prompts[1][1], prompts[1][2])[1] == 0
    assert ask(model, memory, prompts[0][1], prompts[0][2])[1] == 1  # gone, as it was unused for longest


def test_memory_is_lent_to_one_at_a_time() -> None:
    model, memory = golden.tiny(), Memory(2)
    first, second, media = questions(1, 2)
    ask(model, memory, first, media)
    batch = golden.pack([second], [media])
    with memory.lent(model, batch, SHORT) as one, memory.lent(model, batch, SHORT) as other:
        assert one is not other
        assert one.tokens
        assert not other.tokens
    two = golden.pack([first, second], [media, media])
    with memory.lent(model, two, SHORT) as session:
        assert session is None
    with pytest.raises(RuntimeError, match="cut"), memory.lent(model, batch, SHORT) as session:
        raise RuntimeError("cut")
    assert all(kept is not session for kept in memory.sessions)  # half a step may be in it


@pytest.mark.parametrize("size", [-1, True, 1.5])
def test_memories_that_cannot_be(size: object) -> None:
    with pytest.raises(ConfigError, match="cannot be remembered"):
        Memory(size)  # type: ignore[arg-type]


def test_a_fast_assistant_remembers_and_a_plain_one_does_not() -> None:
    class Nothing:
        media = golden.TINY.media

    plain = Assistant(golden.tiny(), Nothing(), Nothing())  # type: ignore[arg-type]
    assert plain.memory.size == 0
    fast = optimize(plain)
    assert (fast.memory.size, fast.processor) == (2, plain.processor)
    assert fast.model is not plain.model
    fast.remember(0)
    assert fast.memory.size == 0


# --- The plain decoder, compiled --------------------------------------------------------------------------------------


def same_logits(compiled: Decoder, plain: Decoder, lengths: tuple[int, ...] = (6, 9, 4)) -> None:
    """Without a cache, as in training and scoring: one that grows by a token a call is no work for a compiler."""
    x = torch.randn(2, 9, plain.width, generator=torch.Generator().manual_seed(1))
    for length in lengths:
        assert error(compiled(x[:, :length]), plain(x[:, :length])) < 1e-5


@torch.inference_mode()
def test_a_decoder_compiles_whole() -> None:
    """Without a break in the graph, at several lengths; eagerly, so that no compiler is needed."""
    torch.compiler.reset()
    plain, compiled = middle()[0], middle()[0]
    compiled.compile(fullgraph=True, backend="eager")
    same_logits(compiled, plain)


@pytest.mark.slow
@pytest.mark.timeout(1500)  # half a minute of a processor, if this has one to itself
@pytest.mark.filterwarnings("ignore")  # inductor's own
@torch.inference_mode()
def test_a_decoder_compiled_by_inductor() -> None:
    torch.compiler.reset()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Decoder(dataclasses.replace(MIDDLE, depth=1)).eval()
    compiled = copy.deepcopy(plain)
    compiled.compile()
    same_logits(compiled, plain, (6,))
