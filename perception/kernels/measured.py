"""Which attention kernel is fastest, found out on the device instead of by hope.

Kernels differ by head size, dtype, length and GPU, and the order changes with each release of the libraries below. The
first call of each kind is run with every kernel that takes it; the answers live as long as the process.

cuDNN takes part only where every query sees every key and both are of one length: that is a picture's attention, whose
sizes come again. It builds a plan for each new shape, which the lengths of texts would cost anew at every call.
"""

import logging
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

log = logging.getLogger(__name__)

BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
ROUNDS = 7
BUSY = 2_000_000  # ticks of a GPU's clock, about a millisecond: longer than Python takes to start any of the kernels

# device, dtype, head_dim, query heads of a key head, "full" | "cross" | "causal" | "mask", queries and keys as powers
# of two
Key = tuple[str, torch.dtype, int, int, str, int, int]
_table: dict[Key, str] = {}


def choices() -> dict[Key, str]:
    """What was measured so far in this process."""
    return dict(_table)


def fastest(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> str:
    """The name of the kernel for tensors like these, shapes as in `perception.attention.attend`.

    Measured when it is first asked for; while a graph is recorded or gradients are wanted nothing can be, and what was
    not measured before is left to "sdpa".
    """
    key = kind_of(q, k, causal, mask)
    if key not in _table:
        if not can_measure(q, k, v):
            return "sdpa"
        _table[key] = measure(q, k, v, causal, mask)
        log.debug("attention %s: %s", key, _table[key])
    return _table[key]


def kind_of(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Key:
    """Calls of one kind share an answer."""
    n, s = (math.ceil(math.log2(max(x.shape[1], 1))) for x in (q, k))
    kind = "causal" if causal else "mask" if mask is not None else "full" if q.shape[1] == k.shape[1] else "cross"
    return (str(q.device), q.dtype, q.shape[3], q.shape[2] // k.shape[2], kind, n, s)


def can_measure(q: Tensor, k: Tensor, v: Tensor) -> bool:
    wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    recording = q.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (wants_gradients or recording or torch.compiler.is_compiling())


def measure(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> str:
    """Run each kernel that takes these tensors, in turns; the one with the least median that is also right."""
    from perception.attention import KERNELS

    def run(name: str) -> Callable[[], Tensor]:
        return lambda: KERNELS[name](q, k, v, causal, mask)

    wanted = run("sdpa")()

    def good(name: str) -> bool:
        try:
            return agree(run(name)(), wanted)
        except RuntimeError as error:  # what a kernel's own rules let through, a library or a driver may still refuse
            log.debug("attention %s failed: %s", name, error)
            return False

    repeated = kind_of(q, k, causal, mask)[4] == "full"
    names = ["sdpa", *(n for n in BACKENDS if (repeated or n != "cudnn") and usable(n, q, k, v, causal, mask))]
    names = [name for name in names if good(name)]
    rounds = [{name: seconds(run(name), q.device) for name in names} for _ in range(ROUNDS + 1)][1:]
    return min(names, key=lambda name: statistics.median(r[name] for r in rounds)) if names else "sdpa"


def agree(got: Tensor, wanted: Tensor) -> bool:
    """Whether two kernels differ by no more than rounding."""
    close = 1e-4 if wanted.dtype == torch.float32 else 2e-2
    error = torch.linalg.vector_norm((got - wanted).float())
    return bool(error <= close * torch.linalg.vector_norm(wanted.float()) + 1e-6)


def seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Time of one run on a GPU, by its own clock.

    The device is kept busy first, so that all of the run waits behind `start` in its queue: an idle device would start
    the clock at once, and then wait for Python.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda._sleep(BUSY)
        start.record()
        run()
        stop.record()
        stop.synchronize()
    return start.elapsed_time(stop) / 1000


def usable(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> bool:
    """Whether one of PyTorch's kernels takes these tensors, by PyTorch's own rules; never on a CPU."""
    if not q.is_cuda:
        return False
    n, s = q.shape[1], k.shape[1]
    if causal and 1 < n < s:
        # what "sdpa" gives it, as far as the rules look: the keys lie side by side
        mask = torch.ones(1, s, dtype=torch.bool, device=q.device).expand(n, s)
    params = torch.backends.cuda.SDPAParams(
        *(x.transpose(1, 2) for x in (q, k, v)), mask, 0.0, causal and n == s, q.shape[2] != k.shape[2]
    )
    from perception.attention import flags

    with flags:  # another thread may have set them to what it measures
        return bool(getattr(torch.backends.cuda, f"can_use_{name}_attention")(params))


def backend_of(name: str) -> SDPBackend:
    return getattr(SDPBackend, BACKENDS[name])
