"""LongBench's metrics, equal to the official ones, quirks included; each maps (answer, right answer, all classes) to 0..1.

Bai et al., "LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding", 2023. arxiv.org/abs/2308.14508
Two libraries are part of the definition: `rouge` 1.0.1 (not `rouge_score`, which counts otherwise) and jieba. Code similarity is
difflib's, which is what the official code computes where its optional accelerator is not installed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from benchmarks.wording import PUNCTUATION, english_f1, f1

CHINESE_PUNCTUATION = frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
Metric = Callable[[str, str, Sequence[str]], float]


@cache
def _jieba() -> Any:
    import jieba

    jieba.setLogLevel(logging.WARNING)  # it reports every dictionary it loads
    return jieba


@cache
def _rouge() -> Any:
    from rouge import Rouge

    return Rouge(metrics=["rouge-l"])


def qa_f1(said: str, wanted: str, classes: Sequence[str] = ()) -> float:
    return english_f1(said, wanted)


def qa_f1_zh(said: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """Words as jieba cuts them, in lower case and without punctuation and white space."""
    ours, theirs = ([word for word in map(_bare_chinese, _jieba().cut(text, cut_all=False)) if word] for text in (said, wanted))
    return f1(ours, theirs)


def _bare_chinese(word: str) -> str:
    kept = (letter for letter in word.lower() if letter not in PUNCTUATION and letter not in CHINESE_PUNCTUATION)
    return "".join("".join(kept).split())


def rouge_l(said: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """0 where the library cannot say, as for an empty answer or one too long for its recursion: so does the official code."""
    try:
        return float(_rouge().get_scores([said], [wanted], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def rouge_l_zh(said: str, wanted: str, classes: Sequence[str] = ()) -> float:
    ours, theirs = (" ".join(_jieba().cut(text, cut_all=False)) for text in (said, wanted))
    return rouge_l(ours, theirs)


def classification(said: str, wanted: str, classes: Sequence[str]) -> float:
    """One over the number of class names in the answer, if the right one is among them.

    Names that are part of the right one do not count. The official loop removes them from the list that it walks, and so skips
    the name behind each: kept, since scores depend on it.
    """
    named = [name for name in classes if name in said]
    for name in named:
        if name in wanted and name != wanted:
            named.remove(name)
    return 1.0 / len(named) if wanted in named else 0.0


def _share_of_numbers(said: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", said)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def count(said: str, wanted: str, classes: Sequence[str] = ()) -> float:
    return _share_of_numbers(said, str(wanted))


def retrieval(said: str, wanted: str, classes: Sequence[str] = ()) -> float:
    return _share_of_numbers(said, re.findall(r"Paragraph (\d+)", wanted)[0])


def retrieval_zh(said: str, wanted: str, classes: Sequence[str] = ()) -> float:
    return _share_of_numbers(said, re.findall(r"段落(\d+)", wanted)[0])


def code_similarity(said: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """Of the first line that holds no backtick, no # and no //: blank lines count."""
    lines = said.lstrip("\n").split("\n")
    line = next((line for line in lines if not ("`" in line or "#" in line or "//" in line)), "")
    if line == wanted:
        return 1.0
    return round(100 * SequenceMatcher(None, line, wanted).ratio()) / 100 if line and wanted else 0.0
