"""Names to things."""

import difflib
from collections.abc import Iterable
from typing import Generic, TypeVar

from perception.errors import UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to things, with a helpful refusal. A name exists because somebody wrote `add`."""

    def __init__(self, kind: str):
        self.kind = kind
        self._things: dict[str, T] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def add(self, name: str, thing: T) -> None:
        """Raises ValueError when the name is taken."""
        if name in self._things:
            raise ValueError(f"{self.kind} {name!r} is already registered")
        self._things[name] = thing

    def get(self, name: str) -> T:
        """The thing of that name. Raises UnknownName."""
        if name not in self._things:
            raise unknown(self.kind, name, self._things)
        return self._things[name]

    def names(self) -> list[str]:
        return sorted(self._things)


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for a name that is not among those that are known, with the nearest of them."""
    folded = {one.casefold(): one for one in sorted(known)}
    near = [folded[close] for close in difflib.get_close_matches(name.casefold(), folded, n=3)]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {', '.join(folded.values())}"
    return UnknownName(f"no {kind} named {name!r}; {hint}")
