"""What came of a request: cells by their status, models that were left out, and what is said of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from harness.engine.reach import UnsupportedModel
from harness.errors import BadRequest
from harness.families import CannotConvert, CannotStore

# Refusals that concern one model: the others are run all the same.
LEFT_OUT = (BadRequest, CannotConvert, CannotStore, UnsupportedModel)


@dataclass
class Tally:
    """Cells of a run, by what became of them."""

    ok: int = 0
    skipped: int = 0
    failed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, status: str, reason: str | None) -> None:
        setattr(self, status, getattr(self, status) + 1)
        if reason:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def tell(self, model: str) -> None:
        print(f"{model}: {self.ok} cells done, {self.skipped} skipped, {self.failed} failed", file=sys.stderr)
        for reason, count in self.reasons.items():
            print(f"  {count} x {reason}", file=sys.stderr)


@dataclass
class Ran:
    """What came of a request."""

    models: int = 1
    failed: int = 0  # cells, and models that were left out
    keys: set[str] = field(default_factory=set)  # ids of all rows that were asked for, finished before or not
    refused: list[Exception] = field(default_factory=list)

    def leave_out(self, model: str, refusal: Exception) -> None:
        """
        Raises:
            the first refusal, if no model is left.
        """
        self.refused.append(refusal)
        if len(self.refused) == self.models:  # nothing is left to run
            raise self.refused[0] from None
        print(f"{model}: skipped, {refusal}", file=sys.stderr)
        self.failed += 1
