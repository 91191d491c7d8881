"""Any causal language model of transformers as a `Decoder` (extra `hf`).

B batch  T tokens  E width  V vocabulary
"""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perception.checkpoint import CONFIG, read_config
from perception.device import pick_device, pick_dtype
from perception.errors import CheckpointError, ConfigError, missing_extra
from perception_lm.decoder import take


class TransformersDecoder(nn.Module):
    """Embeddings to the logits of the next token, by a model of transformers.

    model  anything `AutoModelForCausalLM` loads that takes `inputs_embeds`

    With a cache, each row has transformers' own and runs by itself: what is padded, masked or windowed inside the
    model stays its own business, and a batch equals its singles. A Llama 3 is better served by our own `Decoder`.
    Raises ConfigError for a model that cannot start from embeddings.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        parameters = inspect.signature(model.forward).parameters
        if "inputs_embeds" not in parameters or not hasattr(model, "get_input_embeddings"):
            raise ConfigError(f"{type(model).__name__} takes no 'inputs_embeds'; a decoder starts from embeddings")
        self.model: Any = model
        self.config = self.model.config.get_text_config()
        self.width = int(self.config.hidden_size)
        self._keeps = "logits_to_keep" in parameters

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
    ) -> "TransformersDecoder":
        """A decoder from a folder of transformers. Only safetensors are read, and no code that comes with them is run.

        Raises MissingExtra without transformers, ConfigError for a folder it does not know, CheckpointError for weights
        that are missing, damaged, too many or too few.
        """
        try:
            import transformers
        except Exception as error:  # an installed one may fail at import in its own ways
            raise missing_extra("transformers", "hf", type(error).__name__) from error
        folder, where = Path(folder), pick_device(device)
        named = read_config(folder).get("dtype") or read_config(folder).get("torch_dtype") or "float32"
        stored = getattr(torch, str(named), None)
        stored = stored if isinstance(stored, torch.dtype) else torch.float32
        try:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=pick_dtype(dtype, where, stored),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except OSError as error:
            raise CheckpointError(f"transformers cannot read {folder}: {error}") from error
        except (ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(f"transformers cannot build {folder / CONFIG}: {error}") from error
        wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
        if wrong:
            shown = "; ".join(f"{len(names)} {kind} ({', '.join(names[:5])})" for kind, names in wrong.items())
            raise CheckpointError(f"{folder} does not fit {type(model).__name__}: {shown}")
        return cls(model.to(where)).eval()

    def forward(
        self,
        x: Tensor,
        cache: "RowCaches | None" = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        last: int | Tensor | None = None,
    ) -> Tensor:
        """B T E -> logits B T V, or B k V.

        positions, mask  as our own decoder takes them, without a cache; a mask needs a model without sliding windows
        last             None or 0 all; k the last k; a tensor B k of indices into T
        """
        if cache is not None:
            if len(cache.rows) != len(x):
                raise ValueError(f"{len(x)} rows for a cache of {len(cache.rows)}")
            rows = []
            for n, past in enumerate(cache.rows):
                wanted = last[n : n + 1] if isinstance(last, Tensor) else last
                rows.append(self._run(x[n : n + 1], wanted, past_key_values=past, use_cache=True))
                cache.lengths[n] += x.shape[1]
            return torch.cat(rows)
        options: dict[str, Any] = {}
        if positions is not None:
            options["position_ids"] = positions.expand(x.shape[:2])
        if mask is not None:
            if getattr(self.config, "sliding_window", None) and getattr(self.config, "use_sliding_window", True):
                raise ConfigError(f"{type(self.model).__name__} has a sliding window of its own; a mask would undo it")
            options["attention_mask"] = mask.expand(len(x), 1, x.shape[1], x.shape[1])
        return self._run(x, last, use_cache=False, **options)

    def _run(self, x: Tensor, last: int | Tensor | None, **options: Any) -> Tensor:
        if not self._keeps:
            return take(self.model(inputs_embeds=x, **options).logits, last)
        if not isinstance(last, Tensor):
            return self.model(inputs_embeds=x, logits_to_keep=last or 0, **options).logits
        kept, places = last.unique(return_inverse=True)  # the model takes the same indices for every row
        logits = self.model(inputs_embeds=x, logits_to_keep=kept, **options).logits
        return take(logits, places)

    def embed(self, tokens: Tensor) -> Tensor:
        """B T int64 -> B T E"""
        return self.model.get_input_embeddings()(tokens)

    def new_cache(self, batch: int, capacity: int, *, dtype: torch.dtype | None = None) -> "RowCaches":
        """An empty cache; it grows as it is used, so `capacity` is not taken at once."""
        return RowCaches(batch)


class RowCaches:
    """One cache of transformers for each row.

    lengths  tokens kept, of each row
    """

    def __init__(self, batch: int):
        from transformers import DynamicCache

        self.lengths = [0] * batch
        # Without a config every layer keeps all it saw: a window is in the mask, and what it passed can come back.
        self.rows = [DynamicCache() for _ in range(batch)]

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[b]` tokens of each row b."""
        if len(lengths) != len(self.rows) or any(not 0 <= n <= m for n, m in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"rows of {self.lengths} tokens cannot be cropped to {list(lengths)}")
        for row, (cache, length) in enumerate(zip(self.rows, lengths, strict=True)):
            if length < self.lengths[row]:
                cache.crop(length - self.lengths[row])  # negative: how many to forget; 0 tokens can be left
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> "RowCaches":
        """These rows in this order, as a copy; a row named twice is there twice."""
        new = RowCaches(0)
        new.rows = [copy.deepcopy(self.rows[row]) for row in rows]
        new.lengths = [self.lengths[row] for row in rows]
        return new

    def resized(self, capacity: int) -> "RowCaches":
        """Nothing to do: these caches grow."""
        return self
