"""Conversations to what a model learns from: ids, labels, pixels; and many of them to a row of a pass.

T tokens  M media items  S side of an item  L documents of a row
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from perception.errors import LimitError
from perception_lm import chat
from perception_lm.chat import Conversation, Slots
from perception_lm.losses import IGNORE
from perception_lm.processor import MediaOptions, Processor, _taken, read_conversations

Form = Literal["chat", "warmup"]


class NothingToLearn(LimitError):
    """A sample whose first answer does not fit into the length allowed."""


@dataclass(frozen=True)
class Example:
    """One sample, ready for a model.

    tokens  T int64     what the model reads: all ids but the last
    labels  T int64     what it should say after each; -100 where nothing is asked
    pixels  M 3 S S     None for text alone
    """

    tokens: Tensor
    labels: Tensor
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Conversations to examples, through the processor that answers with the model.

    form     "chat", or "warmup": the picture, the caption and a line break
    seq_len  tokens of an example; turns that do not fit whole are left out, from the first such on
    options  how media are shown, in place of the processor's own way
    """

    processor: Processor
    seq_len: int
    form: Form = "chat"
    options: MediaOptions = field(default_factory=MediaOptions)

    def __call__(self, conversation: Any) -> Example:
        """Raises RequestError and MediaError for what cannot be read, NothingToLearn when no answer fits."""
        (talk,) = read_conversations(conversation if isinstance(conversation, Conversation) else [conversation])
        settled = self.processor._settled(talk, self.options)
        pieces, pixels = self._pieces(talk), {}
        turns = self._turns(talk, pieces)  # what does not fit is found before anything is decoded
        while missing := [s.item for turn in turns for s in turn.slots if s.item not in pixels]:
            for item in missing:
                pixels[item] = self.processor._pixels(settled[item])
                pieces[item] = len(pixels[item])  # a video may end before its header says
            turns = self._turns(talk, pieces)
        ids = [id for turn in turns for id in turn.ids]
        labels = [label for turn in turns for label in (turn.ids if turn.learned else [IGNORE] * len(turn.ids))]
        shown = [_taken(pixels[s.item], s) for turn in turns for s in turn.slots]
        return Example(torch.tensor(ids[:-1]), torch.tensor(labels[1:]), torch.cat(shown) if shown else None)

    def length(self, conversation: Any) -> int:
        """Tokens of the example, from the headers of its files. Errors as those of the call."""
        (talk,) = read_conversations(conversation if isinstance(conversation, Conversation) else [conversation])
        return sum(len(turn.ids) for turn in self._turns(talk, self._pieces(talk))) - 1

    def _pieces(self, talk: Conversation) -> list[int]:
        return self.processor._pieces(talk, self.options, exact=True)

    def _turns(self, talk: Conversation, pieces: Sequence[int]) -> "list[_Turn]":
        """The turns that fit, whole."""
        total, kept = 0, []
        for segments, learned in chat.render_training(talk, pieces, warmup=self.form == "warmup"):
            ids = self.processor._ids(segments, pieces)
            total += len(ids)
            if total + 1 > self.seq_len:
                break
            kept.append(_Turn(ids, learned, [segment for segment in segments if isinstance(segment, Slots)]))
        if not any(turn.learned for turn in kept):
            raise NothingToLearn(
                f"{total} tokens to the end of the first answer; seq_len is {self.seq_len}, so nothing of it is learned"
            )
        return kept


class _Turn(NamedTuple):
    ids: list[int]
    learned: bool
    slots: list[Slots]


# --- rows of a pass ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pack:
    """What goes through the model at once.

    tokens   B T int64
    labels   B T int64   already shifted; -100 where nothing is asked
    lengths  tokens of each document. B = 1 and several: laid end to end. B = len(lengths): rows, padded on the right
    pixels   M 3 S S     the items of all documents, in order
    """

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    pixels: Tensor | None = None

    @property
    def packed(self) -> bool:
        return len(self.tokens) == 1

    @property
    def learned(self) -> int:
        """Tokens that are asked for."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device | str) -> "Pack":
        """Its tokens and labels; the pixels follow a few at a time."""
        return Pack(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.lengths,
            self.pixels,
        )


def join(examples: Sequence[Example]) -> Pack:
    """Examples laid end to end, nothing padded."""
    pixels = [example.pixels for example in examples if example.pixels is not None]
    return Pack(
        torch.cat([example.tokens for example in examples])[None],
        torch.cat([example.labels for example in examples])[None],
        tuple(map(len, examples)),
        torch.cat(pixels) if pixels else None,
    )


def pad(examples: Sequence[Example], width: int, token: int) -> Pack:
    """Examples one under the other, each filled up to `width` tokens: what packing saves."""
    tokens = torch.full((len(examples), width), token)
    labels = torch.full((len(examples), width), IGNORE)
    for row, example in enumerate(examples):
        tokens[row, : len(example)], labels[row, : len(example)] = example.tokens, example.labels
    pixels = [example.pixels for example in examples if example.pixels is not None]
    return Pack(tokens, labels, tuple(map(len, examples)), torch.cat(pixels) if pixels else None)


def plan(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which samples share a row of `room` tokens: the longest first, each into the first row that has room for it.

    Johnson 1973: at most 11/9 of the fewest rows possible, and a row. A sample longer than `room` has one for itself.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((n for n, free in enumerate(left) if free >= lengths[index]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            left.append(room)
        rows[row].append(index)
        left[row] -= lengths[index]
    return [sorted(row) for row in rows]
