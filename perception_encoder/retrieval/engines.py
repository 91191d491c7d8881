"""Who makes the parts: this process, several on this machine, `torchrun`'s ranks, or Ray Data.

All of them carry out one plan with `run_parts`, so the files are the same whoever made them. `load` is a function that
returns the model, called once in each process; it has to be importable or picklable (`functools.partial(pe.load_clip,
"PE-Core-B16-224", device="cuda")`).
"""

import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perception.errors import ConfigError, PerceptionError, missing_extra
from perception_encoder.retrieval.parts import Parts
from perception_encoder.retrieval.pipeline import make_plan, run_parts

log = logging.getLogger(__name__)
Load = Callable[[], Any]


def embed_with_processes(
    load: Load, source: Any, out: str | Path, *, processes: int = 2, threads: int | None = None, **settings: Any
) -> Parts:
    """Like `embed_parts`, with the parts divided among several processes of this machine.

    processes  each loads the model; with CUDA, process i takes device i
    threads    torch threads of each; the machine's cores divided among them by default

    Raises what a process raised; the parts the others finished stay.
    """
    if processes < 1:
        raise ConfigError(f"processes={processes}; give at least 1")
    run = {key: settings.pop(key) for key in ("on_error", "verify", "workers") if key in settings}
    progress = settings.pop("progress", False)
    plan = make_plan(load(), source, Path(out), **settings)
    threads = threads or max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")
    failed = context.SimpleQueue()
    running = [
        context.Process(
            target=_work,
            args=(load, str(out), rank, processes, threads, {**run, "progress": progress and not rank}, failed),
        )
        for rank in range(min(processes, plan.parts))
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
    if not failed.empty():
        raise failed.get()
    if codes := [process.exitcode for process in running if process.exitcode]:
        raise PerceptionError(
            f"{len(codes)} of {len(running)} processes ended with {codes}; run again to finish the parts"
        )
    return Parts(out)


def _work(load: Load, out: str, rank: int, world: int, threads: int, run: dict[str, Any], failed: Any) -> None:
    import torch

    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    try:
        run_parts(load(), Path(out), range(rank, Parts(out).plan.parts, world), **run)
    except Exception as error:  # raised where the work was asked for
        failed.put(error if isinstance(error, PerceptionError) else PerceptionError(f"{type(error).__name__}: {error}"))


def embed_with_ray(
    load: Load,
    source: Any,
    out: str | Path,
    *,
    actors: int = 2,
    gpus: float = 0,
    threads: int | None = None,
    **settings: Any,
) -> Parts:
    """Like `embed_parts`, with the parts handed out by Ray Data, on this machine or on the cluster that is running.

    out     a folder every node sees
    actors  each holds a model; `gpus` of each

    The numbers of the parts travel through Ray, never pictures or vectors: actors read the source and write the parts
    themselves, so the object store cannot fill up, and a lost node costs the parts it was at. What is not finished in
    the end, because an actor was lost for good, is named in the error; run again to finish it.
    """
    ray = _ray()
    run = {key: settings.pop(key) for key in ("on_error", "verify", "workers") if key in settings}
    settings.pop("progress", None)
    folder = Path(out).resolve()
    make_plan(load(), source, folder, **settings)
    todo = Parts(folder).missing(verify=run.get("verify", True))
    if todo:
        started = not ray.is_initialized()
        if started:
            ray.init(log_to_driver=False, include_dashboard=False, configure_logging=False)
        try:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            work = ray.data.from_items([{"part": number} for number in todo], override_num_blocks=len(todo))
            made = work.map_batches(
                _RayActor,
                fn_constructor_args=(load, str(folder), threads, run),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(actors, len(todo))),
                num_gpus=gpus or None,
            )
            done = [row["part"] for row in made.take_all()]
            log.info("Ray made %d parts", len(done))
        finally:
            if started:
                ray.shutdown()
    parts = Parts(folder)
    if missing := parts.missing(verify=False):
        raise PerceptionError(f"parts {missing[:10]} of {folder} were not finished; run again to finish them")
    return parts


class _RayActor:
    """One model in one process of Ray's, that makes the parts it is told to."""

    def __init__(self, load: Load, folder: str, threads: int | None, run: dict[str, Any]):
        import torch

        if threads:
            torch.set_num_threads(threads)
        self.model, self.folder, self.run = load(), Path(folder), run

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        run_parts(self.model, self.folder, [int(number) for number in batch["part"]], **self.run)
        return batch


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise missing_extra("ray", "ray", str(error)) from error
    return ray
