"""Python's own manual, as long English text that every machine has: the topics of `help()`, which come with CPython.

Licence: PSF-2.0. The text differs between versions of Python; its hash is part of every row that reads it.
"""

from __future__ import annotations

from functools import lru_cache

from benchmarks.data import BadData

NAME = "python"  # as texts and haystacks are named
LICENCE = "PSF-2.0 (Python's documentation)"


@lru_cache(maxsize=1)
def manual() -> str:
    """All topics, one behind the other, in the order of their names.

    Raises:
        BadData: this Python came without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise BadData("this Python came without its manual (pydoc_data.topics): name a text of your own") from None
    return "\n\n".join(topics[name].strip() for name in sorted(topics))
