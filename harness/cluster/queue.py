"""Which worker takes which unit: by part, longest first, and few changes of parts."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import Any

from harness.cluster.job import Unit

Group = list[Any]  # units that stay together


class Queue:
    """Units that nobody has in hand, by part.

    A worker stays with the part that it has open. Without units of it, it takes the part with the most work a worker, but only
    where more groups wait than workers have that part open: opening a part is dear, and those who have it will be free soon.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Group]] = {}
        self._work: Counter[str] = Counter()

    def __len__(self) -> int:
        """Groups that wait."""
        return sum(map(len, self._waiting.values()))

    def has(self, part: str | None) -> bool:
        """Does a unit of this part wait?"""
        return part is not None and bool(self._waiting.get(part))

    def add(self, units: Sequence[Unit]) -> None:
        """Units in any order."""
        for part, group in sorted(_grouped(units), key=lambda item: -_size(item[1])):
            self._put(part, group)

    def put_back(self, units: Sequence[Unit], last: bool = False) -> None:
        """What a worker had in hand that is no more; `last`: behind all others, since the worker may have died of it."""
        for part, group in _grouped(units):
            self._put(part, group, first=not last)

    def take(self, part: str | None, workers: Counter[str], never: Collection[str] = ()) -> Group | None:
        """What a worker with this part open does next; None: nothing for it.

        Args:
            workers: how many have each part open, the one that asks among them.
            never: parts that it cannot open.
        """
        if part is not None and part not in never and self.has(part):
            return self._pop(part)
        asked = [other for other, groups in self._waiting.items() if len(groups) > workers[other] and other not in never]
        if not asked:
            return None
        return self._pop(max(asked, key=lambda other: self._work[other] / (workers[other] + 1)))

    def clear(self, part: str | None = None) -> list[Unit]:
        """Takes everything out, or a part's."""
        parts = list(self._waiting) if part is None else [part]
        found = [unit for name in parts for group in self._waiting.pop(name, ()) for unit in group]
        for name in parts:
            del self._work[name]
        return found

    def _put(self, part: str, group: Group, first: bool = False) -> None:
        waiting = self._waiting.setdefault(part, deque())
        waiting.appendleft(group) if first else waiting.append(group)
        self._work[part] += _size(group)  # type: ignore[assignment]

    def _pop(self, part: str) -> Group:
        group = self._waiting[part].popleft()
        self._work[part] -= _size(group)  # type: ignore[assignment]
        return group


def _grouped(units: Sequence[Unit]) -> list[tuple[str, Group]]:
    """Groups with their parts, in the order of their first units."""
    found: dict[tuple[str, str], Group] = {}
    for unit in units:
        found.setdefault((unit.part, unit.group), []).append(unit)
    return [(part, group) for (part, _), group in found.items()]


def _size(group: Group) -> float:
    return float(sum(unit.size for unit in group))
