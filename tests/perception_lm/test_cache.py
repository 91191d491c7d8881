"""Keys and values kept: cached decoding equals uncached decoding, however the tokens come and go."""

import plm_golden as golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perception.errors import LimitError
from perception_lm.cache import Cache, KVCache, Replay
from perception_lm.generation import run

LENGTH = 12
MODEL = golden.tiny().decoder


def embeddings(batch: int = 1, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return MODEL.embed(torch.randint(0, 60, (batch, length), generator=torch.Generator().manual_seed(seed)))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.booleans(), st.integers(0, 9))
@torch.inference_mode()
def test_pieces_equal_the_whole(pieces: list[int], replayed: bool, spare: int) -> None:
    """Trap 22: the last query of every piece sees all that came before, in a cache larger than the prompt too."""
    x = embeddings(2, sum(pieces))
    cache = Replay(2) if replayed else MODEL.new_cache(2, sum(pieces) + spare)
    found = torch.cat([run(MODEL, part, cache) for part in x.split(pieces, dim=1)], dim=1)
    close(found, MODEL(x))
    assert cache.lengths == [sum(pieces)] * 2


@settings(derandomize=True, max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3), st.booleans())
@torch.inference_mode()
def test_rows_of_different_length(lengths: list[int], new: int, replayed: bool) -> None:
    """Rows padded on the right, cropped to their own length, go on as each does alone."""
    rows, T = len(lengths), max(lengths)
    x, more = embeddings(rows, T), embeddings(rows, new, seed=1)
    cache = Replay(rows) if replayed else MODEL.new_cache(rows, T + new)
    run(MODEL, x, cache)
    cache.crop(lengths)
    found = run(MODEL, more, cache)
    for row, length in enumerate(lengths):
        alone = MODEL(torch.cat([x[row : row + 1, :length], more[row : row + 1]], dim=1))
        close(found[row : row + 1], alone[:, length:])


@pytest.mark.parametrize("replayed", [False, True])
@torch.inference_mode()
def test_a_rejected_guess_leaves_no_trace(replayed: bool) -> None:
    x, wrong = embeddings(2), embeddings(2, 3, seed=5)
    cache = Replay(2) if replayed else MODEL.new_cache(2, LENGTH + 3)
    run(MODEL, x[:, :8], cache)
    run(MODEL, wrong, cache)
    cache.crop([8, 8])
    close(run(MODEL, x[:, 8:], cache), MODEL(x)[:, 8:])


@pytest.mark.parametrize("replayed", [False, True])
@torch.inference_mode()
def test_selected_rows(replayed: bool) -> None:
    """A copy: what becomes of one does not touch the other."""
    x, more = embeddings(3), embeddings(4, 2, seed=3)
    cache = Replay(3) if replayed else MODEL.new_cache(3, LENGTH + 2)
    run(MODEL, x, cache)
    cache.crop([LENGTH, 7, 9])
    chosen = cache.select([1, 1, 2, 0])
    assert chosen.lengths == [7, 7, 9, LENGTH]
    found = run(MODEL, more, chosen)
    for row, (source, length) in enumerate([(1, 7), (1, 7), (2, 9), (0, LENGTH)]):
        alone = MODEL(torch.cat([x[source : source + 1, :length], more[row : row + 1]], dim=1))
        close(found[row : row + 1], alone[:, length:])
    assert cache.lengths == [LENGTH, 7, 9]
    close(run(MODEL, more[:1].expand(3, -1, -1), cache)[2:], MODEL(torch.cat([x[2:, :9], more[:1]], dim=1))[:, 9:])


@torch.inference_mode()
def test_resized() -> None:
    x = embeddings()
    cache = MODEL.new_cache(1, 6)
    MODEL(x[:, :6], cache)
    assert cache.resized(5) is cache
    larger = cache.resized(LENGTH)
    assert (larger.capacity, larger.lengths) == (LENGTH, [6])
    close(MODEL(x[:, 6:], larger), MODEL(x)[:, 6:])


@torch.inference_mode()
def test_a_model_keeps_nothing_itself() -> None:
    """Trap 37: caches of different sizes, and passes without one, do not know of each other."""
    x = embeddings()
    plain = MODEL(x)
    for capacity in (LENGTH, 40, LENGTH + 1):
        cache = MODEL.new_cache(1, capacity)
        close(MODEL(x[:, :5], cache), plain[:, :5])
        close(MODEL(x), plain)
        close(MODEL(x[:, 5:], cache), plain[:, 5:])


def test_memory_is_what_the_request_needs() -> None:
    """PLM-1B keeps 32 KiB a token in bfloat16: 16 layers, 8 heads of 64, keys and values."""
    cache = KVCache(1, 100, depth=16, kv_heads=8, head_dim=64, dtype=torch.bfloat16)
    assert cache.nbytes == 100 * 32 * 1024
    assert KVCache(3, 50, depth=16, kv_heads=8, head_dim=64, dtype=torch.bfloat16).nbytes == 150 * 32 * 1024


@torch.inference_mode()
def test_more_than_it_holds() -> None:
    cache = MODEL.new_cache(2, 5)
    MODEL(embeddings(2, 4), cache)
    with pytest.raises(LimitError, match="6 tokens do not fit into a cache of 5"):
        MODEL(embeddings(2, 2), cache)
    assert cache.lengths == [4, 4]
    for wrong in ([5, 4], [-1, 4], [4]):
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(wrong)


@torch.inference_mode()
def test_dtype_of_the_cache() -> None:
    """A half-precision cache under a float32 model rounds keys and values, and nothing else."""
    x = embeddings()
    cache = MODEL.new_cache(1, LENGTH, dtype=torch.bfloat16)
    found = MODEL(x, cache)
    assert found.dtype == torch.float32
    assert cache.keys[0].dtype == torch.bfloat16
    error = (found - MODEL(x)).abs().max() / MODEL(x).std()
    assert 0 < error < 0.2


def test_both_fit_the_protocol() -> None:
    assert isinstance(Replay(1), Cache)
    assert isinstance(MODEL.new_cache(1, 1), Cache)
