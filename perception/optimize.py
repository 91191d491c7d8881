"""A faster twin of a model: the same calls, the same numbers, other operators underneath. The model stays as it is."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NoReturn, Self, get_args

import torch
from torch import Tensor, nn

from perception.errors import ConfigError

Quantize = Literal["int8", "int4", "fp8"]


@dataclass(frozen=True)
class Plan:
    """How a fast twin is to be made.

    quantize  "int8": encoders compute in int8 (weights and activations), decoders keep int8 weights; "int4": decoders
              keep int4 weights and encoders compute in int8; "fp8": both compute in 8-bit floats, on a GPU; None:
              nothing is rounded
    keep      the model stays whole; False gives up each of its weights once the twin holds it in its own layout
    build     compiled kernels may be built where a compiler is at hand
    """

    quantize: Quantize | None = None
    keep: bool = True
    build: bool = True


def optimize(model: Any, quantize: Quantize | None = None, *, keep: bool = True, build: bool = True) -> Any:
    """A twin of `model` for inference that takes the same calls and is faster.

    model     anything whose class names its twin: CLIP, VisionTransformer, TextTransformer, PerceptionLM, Assistant
    quantize  None is exact up to rounding; "int8", "int4" and "fp8" trade a little accuracy for speed and memory. An
              encoder's pooling stays exact, and on a CPU its first block. Tests hold PE-Core-nano on a CPU to a cosine
              above 0.999 for embeddings and for 99 of 100 patches, and above 0.998 for all. On CUDA eight bits stand
              behind a gate: products that lose too much stay exact, and more of them until the whole model's output on
              a made-up input keeps a cosine of 0.999, or 0.995 in "fp8", which needs a GPU of capability 9.0
    keep      False empties `model` while the twin is made, so that both never fill the memory together; True may take
              three times the weights on a CPU: the model's, and a layout each for few and for many rows
    build     False never starts a compiler; kernels compiled before are still used

    `twin.plain` is the model itself (None after keep=False): its parameters keep their names, shapes and values, train
    and save as before. On CUDA a decoder's q, k and v weights, and its gate and up, become parts of one storage, which
    the twin reads as one matrix. Which operators the twin uses was measured on this machine. Raises ConfigError for a
    model without a twin and for settings that do not fit it or the device it lies on.
    """
    if quantize is not None and quantize not in get_args(Quantize):
        raise ConfigError(f"no quantisation {quantize!r}; there are: {', '.join(get_args(Quantize))}, or None")
    if not has_twin(model):
        raise ConfigError(
            f"{type(model).__name__} has no fast twin; optimize() takes CLIP, VisionTransformer, TextTransformer, "
            "PerceptionLM and Assistant, and leaves other libraries' parts inside them as they are"
        )
    import_module("perception.kernels.linear").renew()
    return optimize_part(model, Plan(quantize, keep, build))


def has_twin(model: Any) -> bool:
    """Whether the model's class says where its fast twin is made: `fast = "module:function"`."""
    return isinstance(getattr(type(model), "fast", None), str)


def optimize_part(part: Any, plan: Plan) -> Any:
    """The fast twin of one part of a model, with `.plain`; a part without a twin comes back as it is."""
    if not has_twin(part):
        return part
    if "plain" in vars(part):
        raise ConfigError(f"this {type(part).__name__} is a fast twin already; `.plain` is the model it came from")
    module, _, function = type(part).fast.partition(":")
    twin = getattr(import_module(module), function)(part, plan)
    # Past nn.Module's own __setattr__: as a submodule, the plain model would count twice wherever modules are walked.
    object.__setattr__(twin, "plain", part if plan.keep else None)
    return twin


def check_device(plan: Plan, device: torch.device) -> None:
    """ConfigError for a `quantize` that a device of this kind does not compute in."""
    if plan.quantize == "fp8" and device.type != "cuda":
        raise ConfigError(
            f"fp8 is for CUDA devices of capability 9.0, and the model lies on {device}; move it there, or take "
            "quantize='int8' or 'int4'"
        )


class Twin:
    """What fast twins refuse, parts and whole models alike."""

    def compile(self, **options: Any) -> None:
        """Raises ConfigError: nn.Module's would reach `forward` alone, not `pooled` or `encode_image`; and the compiler
        does not see into packed weights and kernels of our own."""
        raise ConfigError(
            f"a fast twin's operators are chosen already, and {type(self).__name__}.compile() would find none to fuse; "
            "compile the calls of `.plain` that you need, as in torch.compile(clip.plain.encode_image). The twin of a "
            "vision tower on CUDA compiles its large batches: clip.vision.compile()"
        )


class FastPart(Twin, nn.Module):
    """What fast parts share: they compute, and refuse to be trained, moved or saved, as their weights are packed."""

    def __init__(self) -> None:
        super().__init__()
        super().train(False)

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise ConfigError("a fast twin is for inference; train `.plain` and optimise it again")
        return super().train(False)

    def check_inference(self, *inputs: Tensor) -> None:
        """ConfigError for an input that asks for a gradient."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            raise ConfigError("a fast twin computes no gradients; use `.plain`, or detach the input")

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for parameter in self.parameters():
            like = fn(parameter.new_empty(0))
            if (like.device, like.dtype) != (parameter.device, parameter.dtype):
                raise ConfigError(
                    f"a fast twin stays on {parameter.device} in {parameter.dtype}, for which it was packed; "
                    "move `.plain` and optimise it again"
                )
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError("a fast twin has no state_dict, its weights are packed; save `.plain`")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError("a fast twin loads no weights; load them into `.plain` and optimise it again")
