"""What was asked and what came out: the two halves of a row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import Any, Literal, NamedTuple, get_args

from results.lines import Check, dict_of, is_count, is_flag, is_number, is_size, is_square, is_text, list_of, or_none, wrong_field

SCHEMA = 4
MIGRATED = (2, 3)  # older schemas whose rows mean the same: 2 lacks `kept`, both lack what is said of metrics and tasks

# What rows before schema 4 do not say. Reports knew it by name then, so for those rows the names are kept; of what bears another
# name more was better (unless the run had stored a direction, see `results.store`), nothing was right or wrong by its nature, and
# the embedded model was not made for it.
OLD_LOWER_IS_BETTER = ("nll",)
OLD_RIGHT_OR_WRONG = ("exact",)
OLD_EMBEDDED_CAN = ("recall", "two_hop", "recall_many", "needle_text", "needle_facts", "perplexity_own", "random_tokens")

Status = Literal["ok", "skipped", "failed"]
EMBEDDED = "reference"  # the model that comes with the suite
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
    prompt: str  # question_in | question_after | first_question | turns | turns_after
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
        # `vars`, here and below: `asdict` copies all there is, which cost more than the rest of a row
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()[:24]

    @property
    def parent(self) -> str:
        """The unconverted model."""
        return split_variant(self.model)[0]

    @property
    def variant(self) -> str:
        """The conversion, "" for none."""
        return split_variant(self.model)[1]

    @property
    def benchmark_name(self) -> str:
        """With its settings, without its version: "recall(length=512)"."""
        return split_version(self.benchmark)[0]

    @property
    def benchmark_settings(self) -> dict[str, str]:
        """Those that were asked for by name: {"length": "512"}."""
        return split_settings(self.benchmark_name)[1]

    @property
    def task(self) -> str:
        """The benchmark without settings and version: "recall"."""
        return split_settings(self.benchmark_name)[0]

    @property
    def method_name(self) -> str:
        """With its settings, without its version: "snapkv(kernel=5)"."""
        return split_version(self.method)[0]

    @property
    def method_version(self) -> str:
        """A plugin's with the hash of its file: "1+9f86d081"."""
        return split_version(self.method)[1]


def split_variant(model: str) -> tuple[str, str]:
    """Parent and conversion: "reference+gqa-2" -> ("reference", "gqa-2"); without a conversion "" is the second."""
    parent, _, variant = model.partition("+")
    return parent, variant


def split_conversion(variant: str) -> tuple[str, str]:
    """A conversion and its sizes: "mixsga-3:1:6" -> ("mixsga", "3:1:6")."""
    name, _, sizes = variant.partition("-")
    return name, sizes


def split_version(name: str) -> tuple[str, str]:
    """Name and version of a method or benchmark: "snapkv(kernel=5)@1" -> ("snapkv(kernel=5)", "1")."""
    plain, _, version = name.partition("@")
    return plain, version


def split_settings(name: str) -> tuple[str, dict[str, str]]:
    """Name and settings: "snapkv(kernel=5)" -> ("snapkv", {"kernel": "5"})."""
    plain, _, inside = name.partition("(")
    parts = (part.partition("=") for part in inside.removesuffix(")").split(",") if part)
    return plain, {setting.strip(): value for setting, _, value in parts}


def cell_id(key: Key) -> str:
    """The same for all examples of a cell: the name of what is made of them together, `lm_eval/<id>.json`."""
    asked = {name: value for name, value in vars(key).items() if name != "example"}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


class OtherSchema(ValueError):
    """A row of another version of the suite."""


class BudgetSize(NamedTuple):
    """For sorting: KV sizes, then shares."""

    is_share: bool
    amount: float  # percent of the bytes, or entries a stored head; 0 for no budget


def budget_size(budget: str) -> BudgetSize:
    return BudgetSize(budget.endswith("%"), float(budget.removesuffix("%") or 0))


ONLY_SOME = ("by_distance",)  # told where a cell has them, as are those of cells that evict while decoding:
WHILE_DECODING = ("entries_peak", "bytes_kept_peak", "entries_mean", "bytes_kept_mean")  # told where a cell has them


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
    lower_is_better: list[str] = field(default_factory=list)  # names of metrics; of all others more is better
    right_or_wrong: list[str] = field(default_factory=list)  # names of metrics of which an answer has 0 or 1
    embedded_can: bool = False  # was the embedded model made to do the task?
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
    entries_peak: int | None = None  # over the answer, of a cell that evicts while decoding, as are the three below
    bytes_kept_peak: int | None = None
    entries_mean: float | None = None  # over its tokens
    bytes_kept_mean: float | None = None
    by_distance: list[float] | None = None  # of a long text: mean loss of each of its equal parts, in order, nats
    bytes_full: int | None = None  # the unconverted model's full cache of the same prompt: the common denominator
    kept: list[list[int]] | None = None  # [L][Hq] entries that each query head reads; of example 0 alone, for a picture
    schema: int = SCHEMA

    @property
    def bytes_charged(self) -> int | None:
        """What a cell stands at on the byte axis: what it keeps of the prompt or, if it evicts while decoding, its peak."""
        return self.bytes_kept if self.bytes_kept_peak is None else self.bytes_kept_peak

    @property
    def bytes_over_answer(self) -> tuple[float, float] | None:
        """Mean and peak over the answer; a cache that only grows is at its mean halfway."""
        if self.bytes_kept_peak is not None and self.bytes_kept_mean is not None:
            return self.bytes_kept_mean, float(self.bytes_kept_peak)
        if self.bytes_kept is None or self.bytes_kept_end is None:
            return None
        return (self.bytes_kept + self.bytes_kept_end) / 2, float(max(self.bytes_kept, self.bytes_kept_end))

    def to_json(self) -> str:
        said = {name: value for name, value in vars(self).items() if value is not None or name not in (*WHILE_DECODING, *ONLY_SOME)}
        said["key"] = vars(self.key)
        return json.dumps(said, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, row: dict[str, Any], lower: Collection[str] = ()) -> Record:
        """
        Args:
            lower: metrics of which less is better, for rows too old to say it themselves.

        Raises:
            OtherSchema: a row of another version.
            ValueError: fields that are missing, unknown or of another type.
        """
        if not isinstance(row.get("key"), dict) or not is_count(row.get("schema")):
            raise ValueError("no row: a key and a schema are expected")
        if row["schema"] not in (*MIGRATED, SCHEMA):
            raise OtherSchema(f"row of schema {row.get('schema')}, this version reads {', '.join(map(str, (*MIGRATED, SCHEMA)))}")
        unknown = set(row) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"row with unknown fields {sorted(unknown)}")
        if wrong := wrong_field(row["key"], KEY_CHECKS) or wrong_field(row, CHECKS):
            raise ValueError(f"row with wrong fields: {wrong}")
        try:
            found = cls(**{**row, "key": Key(**row["key"])})
            return _sound(found if found.schema == SCHEMA else _migrated(found, lower))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"row with wrong fields: {error}") from None


def is_budget(value: Any) -> bool:
    try:
        return isinstance(value, str) and isfinite(budget_size(value).amount)
    except ValueError:
        return False


OF_TYPE: dict[str, Check] = {"str": is_text, "int": is_count, "float": is_number, "bool": is_flag}
KEY_CHECKS: dict[str, Check] = {field.name: OF_TYPE[str(field.type)] for field in fields(Key)} | {"budget": is_budget}
CHECKS: dict[str, Check] = {
    "status": lambda value: value in get_args(Status),
    "env": is_text,
    **dict.fromkeys(("reason", "answer", "stop_reason"), or_none(is_text)),
    **dict.fromkeys(("metrics", "fidelity"), dict_of(is_number)),
    **dict.fromkeys(("lower_is_better", "right_or_wrong"), list_of(is_text)),
    "embedded_can": is_flag,
    "columns": dict_of(lambda value: is_text(value) or is_flag(value) or is_number(value)),
    "compressed": or_none(is_flag),
    **dict.fromkeys(
        ("prompt_tokens", "new_tokens", "entries_asked", "entries", "bytes_kept", "bytes_allocated", "entries_end", "bytes_kept_end"),
        or_none(is_size),
    ),
    **dict.fromkeys(("entries_peak", "bytes_kept_peak"), or_none(is_size)),
    **dict.fromkeys(("entries_mean", "bytes_kept_mean"), or_none(is_number)),
    "bytes_full": or_none(lambda value: is_count(value) and value > 0),
    "kept": or_none(is_square),
    "by_distance": or_none(list_of(is_number)),
}


def _sound(row: Record) -> Record:
    """A cell with a number that is none is no finished one: such rows, which older versions wrote, are failed."""
    numbers = row.metrics | row.fidelity
    broken = next((name for name, value in numbers.items() if not isfinite(value)), None)
    if row.status != "ok" or broken is None:
        return row
    return replace(row, status="failed", reason=f"{broken} is no number ({numbers[broken]})")


def _migrated(old: Record, lower: Collection[str]) -> Record:
    """With what rows before schema 4 do not say."""
    return replace(
        old,
        lower_is_better=[name for name in old.metrics if name in OLD_LOWER_IS_BETTER or name in lower],
        right_or_wrong=[name for name in old.metrics if name in OLD_RIGHT_OR_WRONG],
        embedded_can=old.key.task in OLD_EMBEDDED_CAN,
        schema=SCHEMA,
    )
