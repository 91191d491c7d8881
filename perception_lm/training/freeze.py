"""Which parts learn: said once, in one place, and nowhere undone."""

import re
from collections.abc import Sequence

from torch import nn

from perception.errors import ConfigError

PARTS = ("encoder", "projector", "decoder")


def learn_only(model: nn.Module, parts: Sequence[str]) -> list[str]:
    """Let these learn and freeze all else; returns the names of the parameters that learn.

    parts  "encoder", "projector", "decoder"; or regular expressions that match whole parameter names

    Raises ConfigError for a part that matches nothing, and when nothing would learn.
    """
    names = [name for name, _ in model.named_parameters()]
    learning: set[str] = set()
    for part in parts:
        try:
            pattern = re.compile(rf"{part}\..*" if part in PARTS else part)
        except re.error as error:
            raise ConfigError(f"learn: {part!r} is no part and no regular expression: {error}") from error
        found = [name for name in names if pattern.fullmatch(name)]
        if not found:
            raise ConfigError(f"learn: {part!r} matches no parameter; parts are {', '.join(PARTS)}")
        learning.update(found)
    if not learning:
        raise ConfigError("nothing would learn: name at least one part")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    return [name for name in names if name in learning]
