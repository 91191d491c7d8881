"""A byte-level BPE of PLM-nano's own, in the file format of Llama 3's (tiktoken): a line is base64, a space, the rank.

The first 256 ranks are the bytes; what follows are merges, the earliest first. Special tokens stand behind the ranks,
in Perception LM's order, and are not in the file.
"""

import base64
import re
from collections.abc import Iterable, Iterator

from perception.errors import missing_extra
from perception_encoder.tokenizer import byte_symbols
from perception_lm.chat import SYSTEM
from perception_lm.tokenizer import PIECES
from perception_lm.training.nano.mixture import Mixture

RANKS = 2048
CAPITALS = re.compile(r"\b[A-Z]{2,}\b")


def train_ranks(texts: Iterable[str], size: int = RANKS) -> bytes:
    """A `tokenizer.model` of `size` ranks from texts. Raises MissingExtra without the package tokenizers."""
    try:
        import tokenizers
    except ImportError as error:
        raise missing_extra("tokenizers", "train") from error
    pre = tokenizers.pre_tokenizers
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Llama 3's own way to cut a text, then bytes.
    model.pre_tokenizer = pre.Sequence(
        [pre.Split(tokenizers.Regex(PIECES), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    to_byte = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    pieces = [bytes(to_byte[s] for s in token) for token, _ in sorted(model.get_vocab().items(), key=lambda i: i[1])]
    ordered = [bytes([byte]) for byte in range(256)] + [piece for piece in pieces if len(piece) > 1]
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(ordered))


def corpus(mixture: Mixture, words: Iterable[str], samples: int = 12_000) -> Iterator[str]:
    """What is asked and answered, and English nouns once each. Capitals are left out: they stay single letters, so
    that a word on a picture is spelled and not looked up."""
    yield from [SYSTEM, "system", "user", "assistant", *map(str, range(101))] * 1000  # whatever a prompt always has
    for index in range(samples):
        for turn in mixture.sample(index).turns:
            yield CAPITALS.sub("", turn.question)
            yield CAPITALS.sub("", turn.answer)
    yield from (f" {word}" for word in words)
