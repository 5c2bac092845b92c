"""How alike two texts are in their words, as LongBench and HeadKV's success tests count it."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = frozenset(string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, English articles and extra white space, in that order (SQuAD's normalisation)."""
    bare = "".join(letter for letter in text.lower() if letter not in PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", bare).split())


def f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words, as bags; 0 if they share none."""
    same = (Counter(said) & Counter(wanted)).total()
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def english_f1(said: str, wanted: str) -> float:
    return f1(normalised(said).split(), normalised(wanted).split())


@cache
def _rouge(kind: str) -> object:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer([kind], use_stemmer=True)


def rouge(kind: str, said: str, wanted: str) -> tuple[float, float, float]:
    """Precision, recall and F of `rouge1` or `rougeL`, by Google's rouge_score with its stemmer."""
    found = _rouge(kind).score(wanted, said)[kind]  # type: ignore[attr-defined]
    return found.precision, found.recall, found.fmeasure
