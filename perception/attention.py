"""Attention, in one place. Nothing else in the project calls a kernel.

B batch  N queries  S keys  heads  head_dim  L documents laid end to end
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], Tensor]
# On a Hopper GPU PyTorch's own order begins with cuDNN, which builds a plan for each new shape: at every token while a
# cache grows, and at every prompt of another length.
ORDER = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with scale head_dim ** -0.5 (Vaswani et al. 2017, section 3.2.1).

    q       B N heads head_dim
    k, v    B S kv_heads head_dim    kv_heads divides heads
    mask    bool, broadcasts to B heads N S; True means "may look"
    return  B N heads head_dim

    `causal` lines the last query up with the last key, so it means the same thing in
    training (N = S), in prefill, and in one-token decoding against a cache (N < S).
    Raises ValueError for shapes that do not fit and for `causal` together with a mask.
    """
    _check(q, k, v)
    if causal and mask is not None:
        raise ValueError("attend() takes causal=True or a mask, not both; fold the causal part into the mask")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}; give bool, where True means 'may look'")
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(f"causal attention of {q.shape[1]} queries over {k.shape[1]} keys: some would see nothing")
    return KERNELS[_active](q, k, v, causal, mask)


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    key_lengths: Sequence[int] | None = None,
    causal: bool = False,
) -> Tensor:
    """`attend` for sequences laid end to end: no token sees another sequence, and nothing is padded.

    q            N heads head_dim       N = sum(lengths)
    k, v         S kv_heads head_dim    S = sum(key_lengths)
    lengths      queries of each of the L sequences
    key_lengths  keys of each; the same as `lengths` by default
    return       N heads head_dim

    Raises ValueError when the lengths do not add up to the tensors.
    """
    key_lengths = lengths if key_lengths is None else key_lengths
    if len(lengths) != len(key_lengths):
        raise ValueError(
            f"{len(lengths)} query lengths and {len(key_lengths)} key lengths; give one of each a sequence"
        )
    if sum(lengths) != q.shape[0] or sum(key_lengths) != k.shape[0]:
        raise ValueError(
            f"lengths add up to {sum(lengths)} queries and {sum(key_lengths)} keys, "
            f"but {q.shape[0]} and {k.shape[0]} were given"
        )
    if _active in PACKED:
        found = PACKED[_active](q, k, v, lengths, key_lengths, causal)
        if found is not None:
            return found
    return alike_together(q, k, v, lengths, key_lengths, causal)


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Use another kernel inside a `with` block: `with attention_kernel("reference"): ...`

    "auto"       the default: "sdpa" on a CPU; on a GPU the fastest of those below for this head size, dtype and length,
                 measured when first met
    "sdpa"       PyTorch's kernels: on a GPU the first of flash, efficient, cuDNN and the plain formula that takes the
                 tensors, and inside `torch.compile` the one that PyTorch chooses
    "flash", "cudnn", "efficient"
                 that one of PyTorch's kernels where it can be used, and "sdpa" where it cannot
    "flex"       FlexAttention, compiled on a GPU
    "reference"  the formula in float32

    The choice is one for the whole process, and so are PyTorch's flags behind it, which a call on a GPU sets and puts
    back. Our own threads take turns at them; attention that another library calls meanwhile sees them too.
    """
    global _active  # noqa: PLW0603  the one mutable global: model code carries no kernel argument because of it
    if name not in KERNELS:
        raise ValueError(f"no attention kernel named {name!r}; here: {', '.join(KERNELS)}")
    before, _active = _active, name
    try:
        yield
    finally:
        _active = before


def causal_mask(n: int, s: int, device: torch.device) -> Tensor:
    """N S bool; the last of n queries sees all s keys."""
    return torch.ones(n, s, dtype=torch.bool, device=device).tril(s - n)


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """The formula in float32: slow, plain, and what every other kernel is tested against."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bnhd,bshd->bhns", q.float(), k.float()) * q.shape[-1] ** -0.5
    if causal:
        mask = causal_mask(q.shape[1], k.shape[1], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhns,bshd->bnhd", scores.softmax(-1), v.float()).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """PyTorch's fused kernels, on a GPU in our order. A compiler plans ahead, and is left to choose itself."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return fused(q, k, v, causal, mask)
    # Also while a graph is recorded: what it was warmed up with has to be what it records.
    with flags, among(*enabled()):
        return fused(q, k, v, causal, mask)


def fused(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """PyTorch's function. Its own `is_causal` counts from the first key, so it is used only when N = S."""
    n, s, shared = q.shape[1], k.shape[1], q.shape[2] != k.shape[2]
    if causal and n < s:  # a single query sees all
        causal, mask = False, causal_mask(n, s, q.device) if n > 1 else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=shared)
    return x.transpose(1, 2)


def auto(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """The fastest kernel measured on this device; PyTorch's own choice on a CPU and inside a compiled graph."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return KERNELS["sdpa"](q, k, v, causal, mask)
    from perception.kernels.measured import fastest

    return KERNELS[fastest(q, k, v, causal, mask)](q, k, v, causal, mask)


flags = RLock()


def enabled() -> list[SDPBackend]:
    """Those of `ORDER` that are not turned off, as by a user's `sdpa_kernel(...)`; all, where nothing is left on."""
    cuda = torch.backends.cuda
    on = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(), cuda.math_sdp_enabled())
    return [backend for backend, is_on in zip(ORDER, on, strict=True) if is_on] or list(ORDER)


@contextmanager
def among(*backends: SDPBackend) -> Iterator[None]:
    """PyTorch's attention takes the first of these that it can. The flags are the process's, so threads take turns."""
    with flags, sdpa_kernel(list(backends), set_priority=True):
        yield


def only(backend: str) -> Kernel:
    """One of PyTorch's fused kernels where it takes these tensors; "sdpa" where it does not."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        from perception.kernels.measured import backend_of, usable

        if not usable(backend, q, k, v, causal, mask):
            return sdpa(q, k, v, causal, mask)
        chosen = backend_of(backend)
        with sdpa_kernel(chosen) if torch.compiler.is_compiling() else among(chosen):  # a compiler knows no locks
            return fused(q, k, v, causal, mask)

    return kernel


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """FlexAttention (Dong et al. 2024). It knows no gradients on a CPU: PyTorch's own choice there."""
    from perception.kernels.packed import flex_attend

    return flex_attend(q, k, v, causal, mask)


def packed_auto(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], causal: bool
) -> Tensor | None:
    """All documents in one call on a GPU; None where there is no such kernel."""
    if not q.is_cuda:
        return None
    from perception.kernels.packed import flex_packed, varlen_packed

    found = varlen_packed(q, k, v, lengths, key_lengths, causal)
    return flex_packed(q, k, v, lengths, key_lengths, causal) if found is None else found


def packed_flex(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], causal: bool
) -> Tensor | None:
    """FlexAttention with a mask of documents; None where it cannot."""
    from perception.kernels.packed import flex_packed

    return flex_packed(q, k, v, lengths, key_lengths, causal)


def alike_together(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], causal: bool
) -> Tensor:
    """One call for all documents of the same size, as a batch; shapes as in `attend_packed`."""
    groups: dict[tuple[int, int], list[int]] = {}
    for document, sizes in enumerate(zip(lengths, key_lengths, strict=True)):
        groups.setdefault(sizes, []).append(document)
    parts = [x.split(list(n)) for x, n in ((q, lengths), (k, key_lengths), (v, key_lengths))]
    found: dict[int, Tensor] = {}
    for members in groups.values():
        batch = attend(*(torch.stack([part[i] for i in members]) for part in parts), causal=causal)
        found.update(zip(members, batch.unbind(), strict=True))
    return torch.cat([found[document] for document in range(len(lengths))]) if found else q.new_empty(q.shape)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k, v are B N heads head_dim; given {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key heads cannot be shared by {q.shape[2]} query heads")


KERNELS: dict[str, Kernel] = {
    "auto": auto,
    "sdpa": sdpa,
    "reference": reference,
    "flash": only("flash"),
    "cudnn": only("cudnn"),
    "efficient": only("efficient"),
    "flex": flex,
}
PACKED = {"auto": packed_auto, "flash": packed_auto, "flex": packed_flex}  # the others take documents alike together
_active = "auto"
