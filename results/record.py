"""What was asked and what came out: the two halves of a row."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

SCHEMA = 3
MIGRATED = (2,)  # older schemas whose rows mean the same: 2 lacks `kept`

Status = Literal["ok", "skipped", "failed"]
DECODES = ("eager", "graph", "compiled")  # ways of decoding of a cost row
Column = str | int | float


@dataclass(frozen=True)
class Key:
    """Everything that was asked. Its hash is the row's identity: a stored key is never run again."""

    model: str  # "name", with "+conversion" for a variant
    revision: str  # a commit, or the sha256 of local weights
    benchmark: str  # "recall@1"
    benchmark_params: str  # repr: every setting, as constructed
    data: str  # sha256 of the data file, "" for generated examples
    example: int
    method: str  # "snapkv@1"
    params: str  # repr of the method
    budget: str  # "128", "25%", "" for a method that takes none
    prompt: str  # question_in | question_after
    chat: str  # raw | template
    truncation: int  # tokens; longer prompts keep their two ends
    granularity: str  # kv | query
    routing: str  # of a mixSGA variant, else ""
    stop: str  # eos | none
    max_new_tokens: int
    dtype: str
    seed: int
    temperature: float  # 0: greedy
    fidelity: bool  # is the cell compared with the full cache token by token?

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]

    @property
    def protocol(self) -> tuple[str, ...]:
        """Rows of different protocols are never ranked together."""
        sampled = (f"temperature={self.temperature:g}",) if self.temperature else ()
        return (self.prompt, self.chat, str(self.truncation), self.granularity, self.routing, self.stop, self.dtype, *sampled)


@dataclass(frozen=True)
class Record:
    """What came out. Counts are None where nothing ran."""

    key: Key
    status: Status
    env: str  # id of <out>/env/<id>.json
    reason: str | None = None
    answer: str | None = None
    stop_reason: str | None = None  # end | length
    metrics: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, float] = field(default_factory=dict)
    columns: dict[str, Column] = field(default_factory=dict)  # of the example: length, depth, ...
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    compressed: bool | None = None  # was anything evicted?
    entries_asked: int | None = None
    entries: int | None = None  # right after compaction, as are the two below
    bytes_kept: int | None = None
    bytes_allocated: int | None = None
    entries_end: int | None = None  # at the last token
    bytes_kept_end: int | None = None
    bytes_full: int | None = None  # the unconverted model's full cache of the same prompt: the common denominator
    kept: list[list[int]] | None = None  # [L][Hq] entries that each query head reads; of example 0 alone, for a picture
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Record:
        """
        Raises:
            ValueError: a row of another schema, or with fields missing or unknown.
        """
        if row.get("schema") in MIGRATED:
            row = {**row, "schema": SCHEMA}
        if row.get("schema") != SCHEMA:
            raise ValueError(f"row of schema {row.get('schema')}, this version reads {', '.join(map(str, (*MIGRATED, SCHEMA)))}")
        unknown = set(row) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"row with unknown fields {sorted(unknown)}")
        try:
            return cls(**{**row, "key": Key(**row["key"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"row with wrong fields: {error}") from None
