"""Weights of the decoder's blocks in 8 or 4 bits, through torchao (extra `quantize`). Activations stay as they are.

Only weights are rounded, and only the seven matrices of each decoder block: the vision tower, the projector, the
embedding and the head are a small part of the memory and a large part of the answer.
"""

from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from perception.errors import ConfigError, missing_extra
from perception_lm.decoder import Decoder
from perception_lm.model import PerceptionLM

Kind = Literal["int8", "int4"]
M = TypeVar("M", bound=nn.Module)
GROUPS = (128, 64, 32)  # columns that share a scale in int4, what its kernels have


def quantize(model: M, kind: Kind, *, group: int = 64) -> M:
    """Round the weights of a model's decoder, in place, and return the model: for inference only.

    kind   "int8": one scale a row, symmetric. "int4": a scale and an offset for each `group` columns of a row
    group  32, 64 or 128. A matrix whose width it does not divide takes the next smaller one that does; one that 32 does
           not divide stays as it is, and `quantized_layers` does not name it

    int4 runs in any floating dtype on a CPU and in bfloat16 on CUDA. Raises ConfigError for a model without a decoder
    of ours, one that is quantised already, a device without the kernels, and when nothing can be rounded; MissingExtra
    without torchao. Nothing has changed when it raises.
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"no quantisation {kind!r}; there are: {', '.join(get_args(Kind))}")
    if group not in GROUPS:
        raise ConfigError(f"group is {group}; choose from {', '.join(map(str, GROUPS))}")
    layers = decoder_linears(model)
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no decoder of blocks with linear layers; nothing to quantise")
    if done := quantized_layers(model):
        raise ConfigError(f"{len(done)} layers are quantised already ({done[0]}, ...); start from the full weights")
    groups = {name: 0 if kind == "int8" else _group(layer, group) for name, layer in layers.items()}
    chosen = {name: layer for name, layer in layers.items() if groups[name] is not None}
    if not chosen:
        width = next(iter(layers.values())).in_features
        raise ConfigError(f"int4 rounds by groups of {', '.join(map(str, GROUPS))} columns; {width} divides into none")
    weight = next(iter(chosen.values())).weight
    configs = _configs(kind, weight, sorted({n for n in groups.values() if n is not None}))
    try:
        from torchao.quantization import quantize_
    except Exception as error:  # an installed one may fail at import in its own ways
        raise missing_extra("torchao", "quantize", type(error).__name__) from error
    for size, config in configs.items():
        # By the very modules: a name may match in another part of the model.
        these = {id(layer) for name, layer in chosen.items() if groups[name] == size}
        quantize_(model, config, filter_fn=lambda module, name, these=these: id(module) in these)
    return model


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder's blocks by their names in `model`, without the head."""
    decoder = model.decoder if isinstance(model, PerceptionLM) else model
    if isinstance(decoder, Decoder):
        blocks: Any = decoder.blocks
        left_out: set[int] = set()
    else:  # another library's, behind `TransformersDecoder`
        blocks = getattr(decoder, "model", None)
        head = blocks.get_output_embeddings() if hasattr(blocks, "get_output_embeddings") else None
        left_out = {id(head)}
        if not isinstance(blocks, nn.Module):
            return {}
    wanted = {id(m) for m in blocks.modules() if isinstance(m, nn.Linear)} - left_out
    return {name: module for name, module in model.named_modules() if id(module) in wanted}


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the layers whose weights are quantised."""
    return [name for name, layer in decoder_linears(model).items() if _is_quantized(layer.weight)]


def weight_bytes(model: nn.Module) -> int:
    """What the parameters take in memory, scales and offsets included; a shared one counts once."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def _is_quantized(weight: Tensor) -> bool:
    return hasattr(weight, "__tensor_flatten__")


def _bytes(tensor: Tensor) -> int:
    if not _is_quantized(tensor):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)


def _group(layer: nn.Linear, wanted: int) -> int | None:
    return next((size for size in GROUPS if size <= wanted and layer.in_features % size == 0), None)


def _configs(kind: Kind, weight: Tensor, groups: list[int]) -> dict[int, Any]:
    """torchao's settings for each size of group. They leave the compiler's global options alone."""
    device = weight.device.type
    if device == "meta":
        raise ConfigError("the model has no weights yet; load them first")
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

        if kind == "int8":
            return {0: Int8WeightOnlyConfig(set_inductor_config=False)}
        if device == "cuda":
            if weight.dtype != torch.bfloat16:
                raise ConfigError(
                    f"int4 on CUDA runs in bfloat16; the model is {weight.dtype}, load it with dtype='bf16'"
                )
            options: dict[str, Any] = {"int4_packing_format": "tile_packed_to_4d", "set_inductor_config": False}
            return {n: Int4WeightOnlyConfig(group_size=n, **options) for n in groups}
        if device == "cpu":
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            return {n: PrototypeInt4WeightOnlyConfig(group_size=n, set_inductor_config=False) for n in groups}
    except ConfigError:
        raise
    except Exception as error:
        raise missing_extra("torchao", "quantize", f"{type(error).__name__}: {error}") from error
    raise ConfigError(f"int4 has no kernel for {device}; use 'int8', or a CPU or a CUDA device")
