"""Documents laid end to end in a pass: none sees another, and each begins at position 0."""

import torch

from perception_lm.cache import Packed, Past
from perception_lm.training.examples import Pack


def past_of(pack: Pack) -> Past:
    """What the decoder's blocks are told of a pass: where its tokens stand and what they may see."""
    if pack.packed:
        return Packed(pack.lengths, pack.tokens.device)
    # Rows filled up on the right: what is before a token is never padding.
    return Past(torch.arange(pack.tokens.shape[1], device=pack.tokens.device).expand(pack.tokens.shape))
