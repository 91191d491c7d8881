"""Several processes as one: started by `torchrun`, sharded by FSDP2, and able to stop together."""

import atexit
import contextlib
import gc
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perception.device import pick_device
from perception.errors import ConfigError, PerceptionError
from perception.settings import check_range

Sharding = Literal["auto", "none", "full", "hybrid"]
Precision = Literal["fp32", "bf16"]
LONGEST = 86_400.0  # seconds that the others wait for what the first process does alone at the end of a run
DONE, ERROR = "done", "error"  # how the first process came to that end
_groups = itertools.count()


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """On what, and how.

    device         as everywhere; under torchrun each process takes the one of its local rank
    precision      "bf16": bf16 passes over fp32 weights, gradients summed in fp32
    shard          "full": parameters over all processes; "hybrid": over those of a node, copied between nodes;
                   "none": one process; "auto": "full" where there are several
    replicas       copies for "hybrid"; the number of nodes when 0
    checkpointing  recompute each block in the backward pass instead of keeping its activations
    compile        compile each block
    timeout        seconds until a process that hears nothing from another gives up
    threads        of torch in each process; 0 leaves them
    """

    device: str = "auto"
    precision: Precision = "fp32"
    shard: Sharding = "auto"
    replicas: int = 0
    checkpointing: bool = False
    compile: bool = False
    timeout: float = 600.0
    threads: int = 0

    def __post_init__(self) -> None:
        check_range("engine.replicas", self.replicas, 0, 10**6)
        check_range("engine.timeout", self.timeout, 0.1, 10**7)
        check_range("engine.threads", self.threads, 0, 4096)


class FirstEnded(PerceptionError, RuntimeError):
    """The first process ended with an error, or did not come to its end; its own message says why."""


class World:
    """The processes of a run; by default, this one alone.

    rank, size   which of how many
    grouped      whether they talk through torch's process group; one process may be a group of its own
    meshes       how the group was divided for sharded parameters
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None, grouped: bool = False):
        self.rank, self.size, self.grouped = rank, size, grouped
        self.device = device or torch.device("cpu")
        self.meshes: list[Any] = []

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes."""
        return self._reduce(values, "SUM")

    def largest(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, "MAX")

    def any(self, flag: bool) -> bool:
        return bool(self._reduce([float(flag)], "MAX")[0])

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over all processes in the place of each tensor, in one journey."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.div_(self.size).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def same(self, value: Any) -> Any:
        """What the first process gave."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def _reduce(self, values: Sequence[float], how: str) -> list[float]:
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how))
        return tensor.tolist()


@contextmanager
def processes(config: EngineConfig) -> Iterator[World]:
    """The world that the environment describes, for as long as the block lasts.

    Nobody leaves it before all have come to its end, unless with an error. The first may take a day longer than the
    others, which is for what it alone writes when a run is done.
    Raises ConfigError for a device that is not here and for shard="none" with several processes, FirstEnded in the
    others when the first ends with an error.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    rank = int(os.environ["RANK"]) if size > 1 else 0
    if size > 1 and config.shard == "none":
        raise ConfigError(
            f"engine.shard is 'none', which is for one process, and {size} were started; "
            "take 'auto', 'full' or 'hybrid'"
        )
    name = config.device
    if size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = pick_device(name)
    if config.threads:
        torch.set_num_threads(config.threads)
    # Sharded parameters are also how bf16 passes keep fp32 weights, with one process too.
    if not (grouped := size > 1 or config.precision == "bf16" or config.shard in ("full", "hybrid")):
        yield World(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Imported while there is a group, they keep it for ever: as the default value of some of their functions.
    from torch.distributed import checkpoint, fsdp  # noqa: F401

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=config.timeout), **alone)
    world = World(rank, size, device, grouped)
    # A group after this one may find the same store, where torchrun keeps it. Processes count their groups alike.
    key = f"first of group {next(_groups)}"
    try:
        try:
            yield world
        except BaseException:
            if world.first:
                with contextlib.suppress(Exception):  # a store that is gone tells the others, too
                    _tell(key, ERROR)
            raise
        if world.first:
            _tell(key, DONE)
        else:
            _wait(key)
        world.any(False)
        _end_threads_in_time(world)
    finally:
        torch.distributed.destroy_process_group()


def _tell(key: str, how: str) -> None:
    torch.distributed.distributed_c10d._get_default_store().set(key, how)


def _wait(key: str) -> None:
    """Until the first process has told how it came to the end.

    By looking into the store, not with an operation of the group: those have the timeout of a step, and what the first
    process writes alone may take longer, a large model to a slow disk. Raises FirstEnded when it ended with an error,
    when it is gone, and after a day.
    """
    store = torch.distributed.distributed_c10d._get_default_store()
    end, pause = time.monotonic() + LONGEST, 0.01
    try:
        while not store.check([key]):
            if time.monotonic() > end:
                raise FirstEnded(f"the first process did not come to the end of the run in {LONGEST:.0f} seconds")
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        how = store.get(key).decode()
    except torch.distributed.DistError as error:
        raise FirstEnded("the first process is gone; its own error says why") from error
    if how != DONE:
        raise FirstEnded("the first process ended with an error, which it has told itself")


def _end_threads_in_time(world: World) -> None:
    """See to it that gloo's threads have ended before the interpreter does.

    Such a thread says that an operation is done, and then puts down its tensors, for which it takes the interpreter's
    lock. Where a busy machine lets it do so only once the interpreter is ending, the lock is refused by ending the
    thread, and C++ ends the process for that: signal 6, after everything was done and saved (pytorch issue 190489).
    The threads end with the last reference to their group. `destroy_process_group` drops torch's own; two are left: a
    mesh's, which torch's cache of sharding decisions keeps alive, and those of sharded modules, which are circles.
    """
    for mesh in world.meshes:
        getattr(mesh, "_pg_registry", {}).clear()
    atexit.unregister(gc.collect)
    atexit.register(gc.collect)


def shard(
    whole: nn.Module, units: Sequence[nn.Module], config: EngineConfig, world: World, exact: Sequence[nn.Module] = ()
) -> None:
    """Spread the parameters of a module over the processes; each unit's are gathered when it is needed.

    units  blocks, each of which fits on a device beside the activations; the whole keeps the rest
    exact  modules whose parameters are not rounded for bf16 passes
    """
    if not world.grouped:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = world.device.type
    if config.shard == "hybrid":
        copies = config.replicas or max(1, world.size // int(os.environ.get("LOCAL_WORLD_SIZE", str(world.size))))
        if world.size % copies:
            raise ConfigError(f"replicas={copies} of {world.size} processes; expected a divisor")
        mesh = init_device_mesh(kind, (copies, world.size // copies), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    world.meshes.append(mesh)
    half = config.precision == "bf16"
    # Positions and rotations stay as precise as they are given: inputs are not cast on the way into a block.
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for unit in exact:
        fully_shard(unit, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    fully_shard(whole, mesh=mesh, mp_policy=policy)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor, put together; a plain one as it is."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
