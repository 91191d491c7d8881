"""Kernels beyond the plain ones: which is chosen, and sequences laid end to end in one call."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from perception import attention
from perception.attention import KERNELS, attend, attend_packed, attention_kernel
from perception.kernels import measured, packed


def tensors(n: int, s: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 8, **options: object) -> list[Tensor]:
    g = torch.Generator().manual_seed(n * 31 + s)
    shapes = ((n, heads), (s, kv_heads), (s, kv_heads))
    return [torch.randn(length, h, head_dim, generator=g, **options) for length, h in shapes]


def alone(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], key_lengths: list[int], causal: bool) -> Tensor:
    parts = zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True)
    return torch.cat([attend(*(x[None] for x in part), causal=causal)[0] for part in parts])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_learns_as_each_alone(kernel: str, causal: bool) -> None:
    """Documents of the same size, of others and in any order; the gradients are those of each by itself."""
    lengths, key_lengths = [3, 1, 3, 5, 1], [4, 1, 4, 7, 2]
    given = tensors(13, 18, requires_grad=True)
    wanted = alone(*given, lengths, key_lengths, causal)
    weight = torch.randn_like(wanted)
    wanted_grads = torch.autograd.grad((wanted * weight).sum(), given)
    with attention_kernel(kernel):
        got = attend_packed(*given, lengths, key_lengths=key_lengths, causal=causal)
        grads = torch.autograd.grad((got * weight).sum(), given)
    torch.testing.assert_close(got, wanted)
    for mine, theirs in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_documents_of_one_size_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = KERNELS["sdpa"]
    monkeypatch.setitem(KERNELS, "sdpa", lambda *given: calls.append(tuple(given[0].shape)) or plain(*given))
    q, k, v = tensors(12, 12)
    attend_packed(q, k, v, [3, 2, 3, 4], causal=True)
    assert sorted(calls) == [(1, 2, 4, 8), (1, 4, 4, 8), (2, 3, 4, 8)]


def test_no_documents() -> None:
    q, k, v = tensors(0, 0)
    assert attend_packed(q, k, v, []).shape == (0, 4, 8)


def test_flex_is_one_call_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the mask is made once for all layers."""
    monkeypatch.setattr(attention, "alike_together", lambda *_: pytest.fail("document by document"))
    packed.document_mask.cache_clear()
    q, k, v = tensors(9, 12)
    with attention_kernel("flex"):
        got = [attend_packed(q, k, v, [3, 1, 5], key_lengths=[4, 1, 7], causal=True) for _ in range(2)]
    assert packed.document_mask.cache_info().hits == 1
    torch.testing.assert_close(got[0], alone(q, k, v, [3, 1, 5], [4, 1, 7], causal=True))
    assert torch.equal(*got)


def test_a_mask_made_in_inference_serves_training() -> None:
    packed.offsets.cache_clear()
    with torch.inference_mode():
        packed.offsets((2, 3), torch.device("cpu"))
    assert not packed.offsets((2, 3), torch.device("cpu")).is_inference()


class Varlen:
    """PyTorch's packed flash attention, by its documentation: in a plain loop, and only what it takes."""

    def newer(self, q, k, v, ends, key_ends, longest, key_longest, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa or q.shape[1] == k.shape[1]
        return self.run(q, k, v, ends, key_ends, longest, key_longest, {(-1, -1): False, (-1, 0): True}[window_size])

    def older(self, q, k, v, ends, key_ends, longest, key_longest, is_causal=False):
        assert q.shape[1] == k.shape[1]
        return self.run(q, k, v, ends, key_ends, longest, key_longest, is_causal)

    def run(self, q, k, v, ends, key_ends, longest, key_longest, causal):
        assert q.dtype == torch.bfloat16
        assert ends.dtype == key_ends.dtype == torch.int32
        lengths, key_lengths = ends.diff().tolist(), key_ends.diff().tolist()
        assert (longest, key_longest) == (max(lengths), max(key_lengths))
        assert ends[0] == key_ends[0] == 0
        return alone(q, k, v, lengths, key_lengths, causal)


@pytest.mark.parametrize("release", ["newer", "older"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_varlen(monkeypatch: pytest.MonkeyPatch, release: str, causal: bool, kv_heads: int) -> None:
    monkeypatch.setattr(packed, "_varlen", lambda: getattr(Varlen(), release))
    q, k, v = (x.bfloat16() for x in tensors(9, 12, kv_heads=kv_heads))
    got = packed.varlen_packed(q, k, v, [3, 1, 5], [4, 1, 7], causal)
    assert got is not None
    torch.testing.assert_close(got, alone(q, k, v, [3, 1, 5], [4, 1, 7], causal))


def test_what_varlen_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_varlen", lambda: lambda *_: pytest.fail("called"))
    assert packed.varlen_packed(*tensors(3, 3), [3], [3], False) is None  # float32
    assert packed.varlen_packed(*(x.bfloat16() for x in tensors(3, 3, head_dim=12)), [3], [3], False) is None
    monkeypatch.setattr(packed, "_varlen", lambda: None)
    assert packed.varlen_packed(*(x.bfloat16() for x in tensors(3, 3)), [3], [3], False) is None


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A device on which the kernels take as long as the test says."""
    times = {"sdpa": 3.0, "flash": 2.0, "cudnn": 1.0, "efficient": 4.0}
    running: list[str] = []

    def named(name: str) -> object:
        return lambda *given: running.append(name) or attention.sdpa(*given) * times.get(f"{name} times", 1)

    def seconds(run: object, device: torch.device) -> float:
        run()
        return times[running[-1]]

    for name in list(times):
        monkeypatch.setitem(KERNELS, name, named(name))
    monkeypatch.setattr(measured, "usable", lambda *_: True)
    monkeypatch.setattr(measured, "seconds", seconds)
    monkeypatch.setattr(measured, "_table", {})
    return times


def test_the_fastest_is_chosen_and_remembered(bench: dict[str, float]) -> None:
    q, k, v = (x[None] for x in tensors(9, 9))
    assert measured.fastest(q, k, v, False, None) == "cudnn"
    bench["efficient"] = 0.1
    assert measured.fastest(*(x[:, :10] for x in (q, k, v)), False, None) == "cudnn"
    assert measured.fastest(q, k, v, True, None) == "efficient"  # another kind of call
    assert len(measured.choices()) == 2
    longer = [x[None] for x in tensors(40, 40)]
    assert measured.fastest(*longer, False, None) == "efficient"


def test_what_plans_for_each_shape_is_for_pictures(bench: dict[str, float]) -> None:
    """cuDNN is the fastest here, but not for texts, whose lengths are new at every call."""
    q, k, v = (x[None] for x in tensors(9, 12))
    assert measured.fastest(q, k, v, True, None) == "flash"
    assert measured.fastest(q, k, v, False, torch.ones(9, 12, dtype=torch.bool)) == "flash"
    assert measured.fastest(q, k, v, False, None) == "flash"  # a query that reads a growing memory
    assert measured.fastest(q, k[:, :9], v[:, :9], False, None) == "cudnn"


def test_a_kernel_that_fails_is_not_chosen(bench: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*given: object) -> Tensor:
        raise RuntimeError("no plan for these tensors")

    q, k, v = (x[None] for x in tensors(9, 9))
    monkeypatch.setitem(KERNELS, "cudnn", refuses)
    assert measured.fastest(q, k, v, False, None) == "flash"


def test_a_fast_kernel_that_is_wrong_is_not_chosen(bench: dict[str, float]) -> None:
    q, k, v = (x[None] for x in tensors(9, 9))
    bench["cudnn times"] = 1.1
    assert measured.fastest(q, k, v, False, None) == "flash"
    bench["flash times"] = float("nan")
    measured._table.clear()
    assert measured.fastest(q, k, v, False, None) == "sdpa"


def test_gradients_are_never_measured(bench: dict[str, float]) -> None:
    q, k, v = (x[None].requires_grad_() for x in tensors(9, 9))
    assert measured.fastest(q, k, v, False, None) == "sdpa"
    assert not measured.choices()
    with torch.no_grad():
        assert measured.fastest(q, k, v, False, None) == "cudnn"
    assert measured.fastest(q, k, v, False, None) == "cudnn"


class SaysCuda(Tensor):
    """A tensor on the CPU that takes the ways of one on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def orders(monkeypatch: pytest.MonkeyPatch) -> list[list[SDPBackend]]:
    """Among which of its kernels, in which order, PyTorch's function was left to choose at each call."""
    found: list[list[SDPBackend]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(*given: object, **options: object) -> Tensor:
        found.append(_cur_sdpa_kernel_backends(with_priority=True))
        return plain(*given, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    return found


def test_the_order_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, one kernel where one is asked for, and PyTorch's own again afterwards and in a compiler's hands."""
    monkeypatch.setattr(measured, "usable", lambda name, *_: name == "flash")
    before, found = _cur_sdpa_kernel_backends(with_priority=True), orders(monkeypatch)
    q, k, v = (x[None].as_subclass(SaysCuda) for x in tensors(5, 5))
    for name in ("sdpa", "flash", "cudnn"):
        with attention_kernel(name):
            attend(q, k, v, causal=True)
    assert found == [list(attention.ORDER), [SDPBackend.FLASH_ATTENTION], list(attention.ORDER)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    attend(q, k, v, causal=True)
    assert found[3] == _cur_sdpa_kernel_backends(with_priority=True) == before


def test_threads_take_turns_at_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds what it set, and all leave what they found."""
    before = _cur_sdpa_kernel_backends(with_priority=True)

    def holds(backend: SDPBackend) -> bool:
        with attention.among(backend):
            time.sleep(0.005)
            return _cur_sdpa_kernel_backends() == [backend]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(holds, attention.ORDER * 4))
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_the_mask_that_the_rules_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *given: shown.append(given[3]))
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda params: True)
    q, k, v = (x[None].as_subclass(SaysCuda) for x in tensors(5, 9))
    assert measured.usable("efficient", q, k, v, True, None)
    assert (shown[0].shape, shown[0].stride(-1)) == ((5, 9), 1)


def test_kernels_of_a_gpu_are_not_used_on_a_cpu() -> None:
    q, k, v = (x[None] for x in tensors(5, 5))
    for name in measured.BACKENDS:
        assert not measured.usable(name, q, k, v, False, None)
        assert measured.backend_of(name).name.lower().startswith(name)
        with attention_kernel(name):
            assert torch.equal(attend(q, k, v), attention.sdpa(q, k, v, False, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("head_dim", [24, 64, 96, 128])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu(head_dim: int, kernel: str, dtype: torch.dtype) -> None:
    given = [x.to("cuda", dtype) for x in tensors(9, 12, head_dim=head_dim)]
    lengths, key_lengths = [3, 1, 5], [4, 1, 7]
    for causal in (False, True):
        with attention_kernel("reference"):
            wanted = alone(*given, lengths, key_lengths, causal)
        leaves = [x.clone().requires_grad_() for x in given]
        with attention_kernel(kernel):
            got = attend_packed(*leaves, lengths, key_lengths=key_lengths, causal=causal)
            single = attend(*(x[None] for x in given), causal=causal)
        got.float().square().sum().backward()
        close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
        torch.testing.assert_close(got, wanted, **close)
        with attention_kernel("reference"):
            torch.testing.assert_close(single, attend(*(x[None] for x in given), causal=causal), **close)
        assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def test_backends_that_a_user_turned_off_stay_off() -> None:
    assert attention.enabled() == list(attention.ORDER)
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
        assert attention.enabled() == [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    assert attention.enabled() == list(attention.ORDER)
