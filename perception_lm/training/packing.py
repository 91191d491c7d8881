"""Documents laid end to end in a pass: none sees another, and each begins at position 0."""

import torch

from perception_lm.cache import Past
from perception_lm.training.examples import Pack


def past_of(pack: Pack) -> Past:
    """What the decoder's blocks are told of a pass: where its tokens stand and what they may see."""
    device = pack.tokens.device
    if not pack.packed or len(pack.lengths) == 1:
        return Past(torch.arange(pack.tokens.shape[1], device=device).expand(pack.tokens.shape))
    lengths = torch.tensor(pack.lengths, device=device)
    ends = lengths.cumsum(0)
    index = torch.arange(pack.tokens.shape[1], device=device)
    document = torch.searchsorted(ends, index, right=True)
    positions = index - (ends - lengths)[document]
    mask = (document[:, None] == document) & (index[:, None] >= index)
    return Past(positions[None], mask[None, None])
