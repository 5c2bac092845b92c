"""capitals: read a list of capitals many times over, then name one.

A benchmark gives examples by number and scores answers. Prompts, truncation, caches and files are the harness's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.base import CountTokens, Example, Metric

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo", "Cuba": "Havana"}


@dataclass(frozen=True)  # its repr is part of every row, so every setting is on record
class Capitals:
    times: int = 8  # how often the list is told; `capitals(times=20)` on the command line changes it
    name = "capitals@1"  # raise the version when prompts or scoring change: rows of the two never mix
    metrics = (Metric("exact", unit="share", right_or_wrong=True),)  # an answer has 0 or 1
    size = None  # as many examples as one likes
    forced = False  # answers are generated, not scored for their likelihood
    chat = True  # a chat template may be put around its prompts
    data = ""  # sha256 of the data file, where there is one

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        """The same for the same seed and index, whether or not others were made."""
        rng = random.Random(f"{self.name}/{seed}/{index}")
        told = [f"The capital of {country} is {city}." for country, city in CAPITALS.items()] * self.times
        rng.shuffle(told)
        country = rng.choice(list(CAPITALS))
        context = " ".join(told)
        question = f" Question: the capital of {country} is"  # what lies behind `context` is asked after compaction
        return Example(index, context + question, len(context), (CAPITALS[country],), max_new_tokens=8)

    def score(self, answer: str, example: Example) -> dict[str, float]:
        return {"exact": float(answer.strip().startswith(example.answers[0]))}


BENCHMARKS = {"capitals": Capitals()}
