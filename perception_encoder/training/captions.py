"""What a drawing may be called: templates, tags, and a few of each for every concept."""

import random
from collections.abc import Iterable, Sequence

from perception_encoder.training.drawings import Concept

TEMPLATES = (
    "{}",
    "a drawing of {}",
    "an emoji of {}",
    "a small picture of {}",
    "an icon that shows {}",
    "a simple illustration of {}",
    "clip art of {}",
    "a cartoon of {}",
    "a picture of {}",
)
# What the held-out figures are measured with.
EVALUATION_TEMPLATES = ("{}", "a drawing of {}", "an emoji of {}")


def write_captions(
    concepts: Sequence[Concept], each: int = 12, seed: int = 0, hide: Iterable[str] = ()
) -> list[list[str]]:
    """`each` captions a concept: half name it in a template, a third add tags, the rest are tags alone.

    hide    names that must not appear as tags: those of the unseen concepts
    """
    hidden, draw, found = set(hide), random.Random(seed), []
    for concept in concepts:
        tags = [tag for tag in concept.tags if tag not in hidden and tag != concept.label]
        captions = [template.format(concept.label) for template in draw.sample(TEMPLATES, each // 2)]
        while len(captions) < each:
            some = draw.sample(tags, min(len(tags), draw.randint(1, 3)))
            named = len(captions) < each // 2 + each // 3 or not some
            words = ", ".join([concept.label, *some] if named else some)
            captions.append(draw.choice(TEMPLATES).format(words))
        found.append(captions)
    return found
