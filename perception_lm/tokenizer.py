"""The byte-pair tokenizer of Llama 3, with the special tokens of Perception LM behind the ranks.

Text of a user never becomes a special token: `encode` does not know them. Special ids come from `special`, by name, and
only the chat template asks for them.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from perception.errors import CheckpointError, ConfigError, missing_extra
from perception.files import atomic_write
from perception.media import HEAD, sniff
from perception_encoder.tokenizer import byte_symbols

# Where text is cut before pairs merge. Digits in threes: "[040,482,112,576]" is a few ids, the same few every time.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, END, IMAGE, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|image|>", "<|eot_id|>"
VIDEO = "<|video|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"


def _reserved(first: int, last: int) -> tuple[str, ...]:
    return tuple(f"<|reserved_special_token_{i}|>" for i in range(first, last + 1))


# Perception LM's order, which is not Llama's own: <|image|> is the third, where Llama 3 reserves one.
SPECIAL = (BOS, END, IMAGE, *_reserved(1, 3), START_HEADER, END_HEADER, *_reserved(4, 4), EOT, *_reserved(5, 250))
ALIASES = {VIDEO: "<|reserved_special_token_1|>"}  # Hugging Face's name for it
FILES = ("tokenizer.model", "tokenizer.json")

MAX_BYTES = 64 * 2**20  # of a tokenizer's file; Llama 3's are 2 and 17 MB
MAX_PART = 4_000_000  # characters encoded at once
MAX_RUN = 250_000  # spaces, or other characters, in a row: the cut that the published tokenizer makes too


class LlamaTokenizer:
    """Text to ids and back.

    special      name -> id of every special token
    vocab        ids there are, special ones included
    bos, eot     begin_of_text, and the end of a turn
    pad          what rows are filled up with: end_of_text, as everywhere; a mask goes by position, never by this id
    stop_ids     ids that end an answer
    image_token  the id that keeps a slot for media; pictures and videos alike
    """

    def __init__(
        self,
        pieces: Mapping[int, bytes],
        encode: Callable[[str], list[int]],
        special: Mapping[str, int],
        *,
        source: bytes = b"",
        filename: str = FILES[0],
    ):
        lacking = [name for name in (BOS, END, IMAGE, START_HEADER, END_HEADER, EOT) if name not in special]
        if lacking:
            raise ConfigError(f"the tokenizer has no special tokens {lacking}, which the chat format needs")
        self._pieces, self._encode = pieces, encode
        self.special = dict(special)
        self._names = {id: name for name, id in reversed(self.special.items())}
        self.source, self.filename = source, filename
        self.vocab = 1 + max((*pieces, *self.special.values()))
        self.bos, self.eot, self.end_of_text = special[BOS], special[EOT], special[END]
        self.pad = self.end_of_text
        self.stop_ids = frozenset((self.end_of_text, self.eot))
        self.image_token = special[IMAGE]
        self.video_token = special.get(VIDEO, self.image_token)

    @classmethod
    def from_file(cls, path: str | Path) -> "LlamaTokenizer":
        """A `tokenizer.model` (tiktoken's format), a `tokenizer.json` (Hugging Face), or a folder with one of them.

        Raises CheckpointError for a file that is neither, ConfigError for one without the special tokens.
        """
        path = Path(path)
        if path.is_dir():
            found = next((path / name for name in FILES if (path / name).is_file()), None)
            if found is None:
                raise CheckpointError(f"{path} has neither {FILES[0]} nor {FILES[1]}")
            path = found
        return cls.from_bytes(_read(path), name=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "the tokenizer") -> "LlamaTokenizer":
        """What `from_file` does, of a file that is in memory."""
        if data[:1] == b"{":
            return cls._from_json(data, name)
        ranks = read_ranks(data, name)
        special = {special: len(ranks) + i for i, special in enumerate(SPECIAL)}
        special.update({alias: special[theirs] for alias, theirs in ALIASES.items()})
        pieces = {rank: piece for piece, rank in ranks.items()}
        return cls(pieces, _tiktoken(ranks), special, source=data, filename=FILES[0])

    @classmethod
    def of_bytes(cls) -> "LlamaTokenizer":
        """256 ids, one a byte, and the special ones: for small models of one's own, where there is no file."""
        lines = (base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256))
        return cls.from_bytes(b"\n".join(lines))

    @classmethod
    def _from_json(cls, data: bytes, name: str) -> "LlamaTokenizer":
        try:
            content = json.loads(data)
            added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
            vocabulary = {token: id for token, id in content["model"]["vocab"].items() if token not in added}
            kind = content["model"].get("type", "BPE")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{name} is no tokenizer.json: {type(error).__name__}: {error}") from error
        if kind != "BPE":
            raise ConfigError(f"{name} holds a {kind} tokenizer; expected byte-level BPE, as Llama 3's")
        to_byte = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        try:
            pieces = {int(id): bytes(to_byte[symbol] for symbol in token) for token, id in vocabulary.items()}
        except KeyError as error:
            raise ConfigError(f"{name} is not byte-level: its vocabulary has the character {error}") from error
        # Without its added tokens the tokenizer reads them as the text they are.
        content.update(added_tokens=[], post_processor=None, padding=None, truncation=None)
        return cls(pieces, _tokenizers(content, name), _special(added, name), source=data, filename=FILES[1])

    def __repr__(self) -> str:
        return f"LlamaTokenizer(vocab={self.vocab}, from {self.filename})"

    def encode(self, text: str) -> list[int]:
        """The ids of a text; names of special tokens in it are text like any other (F-85)."""
        if not isinstance(text, str):
            raise TypeError(f"the tokenizer takes text; given {type(text).__name__}")
        # Half a surrogate pair is no character; it becomes U+FFFD, as everywhere text meets bytes.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return [id for part in _parts(text) for id in self._encode(part)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of some ids, no space added or taken away; half a character comes out as U+FFFD.

        skip_special  False: special tokens appear by their names

        Raises ValueError for ids outside the vocabulary.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """The bytes of some ids; of a text that is still being written the end may be half a character."""
        parts = []
        for id in map(int, ids):
            if (piece := self._pieces.get(id)) is not None:
                parts.append(piece)
            elif (name := self._names.get(id)) is not None:
                parts.append(b"" if skip_special else name.encode())
            elif not 0 <= id < self.vocab:
                raise ValueError(f"id {id} is not in the vocabulary of {self.vocab}")
        return b"".join(parts)

    def save(self, folder: str | Path) -> Path:
        """Write the file this tokenizer was read from into a folder, byte for byte; returns its path."""
        path = Path(folder) / self.filename
        with atomic_write(path) as temporary:
            temporary.write_bytes(self.source)
        return path


def read_ranks(data: bytes, name: str = "the tokenizer") -> dict[bytes, int]:
    """Bytes to rank, from tiktoken's format: a line is base64, a space, the rank.

    Raises CheckpointError unless the ranks are 0, 1, 2, ... and every byte has one: anything else could not encode.
    """
    if not (lines := data.split()) or len(lines) % 2:
        raise CheckpointError(f"{name} is no tokenizer: it holds {sniff(data[:HEAD])}")
    try:
        pairs = zip(lines[::2], lines[1::2], strict=True)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"{name} is no tokenizer: it holds {sniff(data[:HEAD])} ({error})") from error
    if sorted(ranks.values()) != list(range(len(lines) // 2)) or len(ranks) != len(lines) // 2:
        raise CheckpointError(f"{name}: the ranks are not 0 to {len(lines) // 2 - 1}, each once")
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CheckpointError(f"{name} has no rank for {len(lacking)} of the 256 bytes, such as {lacking[0]}")
    return ranks


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise CheckpointError(f"no tokenizer at {path}; expected {FILES[0]} or {FILES[1]}")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, too many for a tokenizer (MAX_BYTES={MAX_BYTES})")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _tiktoken(ranks: dict[bytes, int]) -> Callable[[str], list[int]]:
    try:
        import tiktoken
    except ImportError as error:
        raise missing_extra("tiktoken", "lm") from error
    # Built here from the ranks: tiktoken's own reader keeps files by path, and reads a changed one stale.
    encoding = tiktoken.Encoding("perception-lm", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={})
    return encoding.encode_ordinary


def _tokenizers(content: dict[str, Any], name: str) -> Callable[[str], list[int]]:
    try:
        import tokenizers
    except ImportError as error:
        raise missing_extra("tokenizers", "lm") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises Exception itself
        raise CheckpointError(f"{name} is no tokenizer.json: {error}") from error
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _special(added: Mapping[str, int], name: str) -> dict[str, int]:
    """Names to ids: the file's own, or, of a stock Llama 3 tokenizer, Perception LM's for the same places."""
    if IMAGE in added:
        video = added.get(VIDEO, added.get(ALIASES[VIDEO], added[IMAGE]))
        return {**added, VIDEO: video, ALIASES[VIDEO]: added.get(ALIASES[VIDEO], video)}
    first = added.get(BOS, -1)
    places = {special: first + i for i, special in enumerate(SPECIAL)}
    same = (BOS, END, START_HEADER, END_HEADER, EOT)
    if first < 0 or any(added.get(special) != places[special] for special in same):
        raise ConfigError(f"{name} has no {IMAGE}, and its special tokens are not where Llama 3 has them")
    return {**places, **{alias: places[theirs] for alias, theirs in ALIASES.items()}}


def _parts(text: str) -> Iterator[str]:
    """The text in parts that the encoder can take: byte pairs over a long run cost more than its length."""
    for start in range(0, len(text), MAX_PART):
        part = text[start : start + MAX_PART]
        first, run, space = 0, 0, None
        if len(part) > MAX_RUN:
            for i, character in enumerate(part):
                run = run + 1 if character.isspace() == space else 1
                space = character.isspace()
                if run > MAX_RUN:
                    yield part[first:i]
                    first, run = i, 1
        yield part[first:]
