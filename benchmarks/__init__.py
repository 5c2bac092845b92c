"""The quality benchmarks, by name. This table is the only list; it has no logic."""

from benchmarks.base import Task
from benchmarks.random_tokens import RandomTokens

BENCHMARKS: dict[str, Task] = {
    "random_tokens": RandomTokens(),
}
