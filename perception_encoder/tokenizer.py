"""The byte-pair tokenizer of CLIP (Radford et al. 2021; OpenAI's vocabulary of 49,408, MIT licence).

B texts  n ids, the context
"""

import gzip
import html
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from perception.errors import ConfigError

START, END = "<start_of_text>", "<end_of_text>"
WORD_END = "</w>"
# Contractions, runs of letters, single digits, runs of anything else that is not a space.
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Texts to ids: start, the text's byte pairs, end, zeros up to the context.

    context        ids a text: 32 for PE-Core T to L, 72 for G
    allow_special  `<start_of_text>` and `<end_of_text>` inside a text become the special ids, as everywhere else CLIP's
                   vocabulary is used; a text then ends, for the model, at the first end. False: they are plain text.

    A longer text keeps its first ids and the end; a warning says how many texts were cut.
    """

    def __init__(self, context: int = 32, *, allow_special: bool = True):
        if isinstance(context, bool) or not isinstance(context, int) or context < 2:
            raise ConfigError(f"a context holds at least start and end, so 2 ids or more; given {context!r}")
        self.context, self.allow_special = context, allow_special

    def __repr__(self) -> str:
        return f"ClipTokenizer(context={self.context}, allow_special={self.allow_special})"

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """B n int64; one text is a batch of one. Raises TypeError for what is not text."""
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, Iterable):
            raise TypeError(f"the tokenizer takes a text or a list of texts; given {type(texts).__name__}")
        texts = list(texts)
        tokens = torch.zeros(len(texts), self.context, dtype=torch.int64)
        cut, v = 0, vocabulary()
        for row, text in enumerate(texts):
            ids = [v.start, *self.encode(text), v.end]
            if len(ids) > self.context:
                cut += 1
                ids = [*ids[: self.context - 1], v.end]
            tokens[row, : len(ids)] = torch.tensor(ids)
        if cut:
            warnings.warn(f"{cut} of {len(texts)} texts are longer than {self.context} ids and were cut", stacklevel=2)
        return tokens

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without start, end, padding or cutting."""
        if not isinstance(text, str):
            raise TypeError(f"the tokenizer takes texts; given {type(text).__name__} ({text!r})")
        v = vocabulary()
        special = {START: v.start, END: v.end} if self.allow_special else {}
        ids: list[int] = []
        for piece in pattern(self.allow_special).findall(clean(text)):
            ids += [special[piece]] if piece in special else word_ids(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids as the tokenizer sees it: lower case, spaced; start, end and what follows dropped."""
        v, symbols = vocabulary(), []
        for token in map(int, ids):
            if token == v.end:
                break
            if not 0 <= token <= v.end:
                raise ValueError(f"id {token} is not in the vocabulary of {v.end + 1}")
            if token != v.start:
                symbols.append(v.symbols[token])
        unicode_to_byte = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        raw = "".join(symbols).replace(WORD_END, " ")
        return bytearray(unicode_to_byte.get(c, ord(" ")) for c in raw).decode("utf-8", errors="replace").strip()


class Vocabulary(NamedTuple):
    symbols: list[str]  # id -> symbol
    ids: dict[str, int]  # symbol -> id
    ranks: dict[tuple[str, str], int]  # pair -> the order in which pairs merge
    start: int
    end: int


@lru_cache(maxsize=1)
def vocabulary() -> Vocabulary:
    """256 bytes, 256 bytes that end a word, one symbol a merge, start, end."""
    packed = resources.files("perception_encoder").joinpath("weights/clip_merges.txt.gz").read_bytes()
    merges = [tuple(line.split(" ")) for line in gzip.decompress(packed).decode("utf-8").splitlines()]
    order = printable() + [byte for byte in range(256) if byte not in set(printable())]
    symbol = byte_symbols()
    symbols = [symbol[byte] for byte in order]
    symbols += [s + WORD_END for s in symbols] + ["".join(pair) for pair in merges] + [START, END]
    ids = {s: i for i, s in enumerate(symbols)}
    ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
    return Vocabulary(symbols, ids, ranks, start=ids[START], end=ids[END])


def printable() -> list[int]:
    """The bytes that stand for themselves, in the order of GPT-2's byte table."""
    return [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]


@lru_cache(maxsize=1)
def byte_symbols() -> list[str]:
    """byte -> a printable character: itself, or the next free one from U+0100 on."""
    shown, table, free = set(printable()), [], 0x100
    for byte in range(256):
        table.append(chr(byte if byte in shown else free))
        free += byte not in shown
    return table


@lru_cache(maxsize=2)
def pattern(allow_special: bool):  # type: ignore[no-untyped-def]  # regex ships no types
    import regex

    special = f"{START}|{END}|" if allow_special else ""
    return regex.compile(special + PIECES, regex.IGNORECASE)


def clean(text: str) -> str:
    """Mend encoding slips, undo HTML escapes twice over, one space between words, lower case."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=65_536)
def word_ids(word: str) -> list[int]:
    """Byte-pair ids of one word: the earliest learned pair merges first, everywhere it occurs, until none is left."""
    v, symbol = vocabulary(), byte_symbols()
    parts = [symbol[byte] for byte in word.encode("utf-8")]
    parts[-1] += WORD_END
    while len(parts) > 1:
        pair = min(pairwise(parts), key=lambda pair: v.ranks.get(pair, len(v.ranks)))
        if pair not in v.ranks:
            break
        merged, i = [], 0
        while i < len(parts):
            if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
                merged.append(parts[i] + parts[i + 1])
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return [v.ids[part] for part in parts]
