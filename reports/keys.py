"""What lines, panels and means are grouped by: fields, each of which says in words what is shown of it.

Whatever groups, compares or leaves a part out does it by field (`replace(protocol, truncation=None)`), never by the words.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from math import isfinite

from results.record import Column, Key, Record, budget_size, split_conversion, split_settings


def number(column: Column | None) -> float | None:
    """A column of an example that is counted with; None for what is no number."""
    return float(column) if isinstance(column, int | float) and isfinite(column) else None


@dataclass(frozen=True)
class Protocol:
    """How a task was asked. Rows of different protocols are never ranked together."""

    prompt: str
    chat: str
    truncation: int | None  # tokens; None: it may differ from task to task
    granularity: str
    routing: str  # "" for a model that does not route its tokens, or where both routings stand side by side
    stop: str
    dtype: str
    temperature: float

    @classmethod
    def of(cls, key: Key) -> Protocol:
        return cls(**{field.name: getattr(key, field.name) for field in fields(cls)})

    def __str__(self) -> str:
        """All of it but the prompt, which is shown apart."""
        parts = (
            "raw prompt" if self.chat == "raw" else "chat template",
            "" if self.truncation is None else f"at most {self.truncation} tokens",
            f"a row a {'KV' if self.granularity == 'kv' else 'query'} head",
            f"sampled at temperature {self.temperature:.12g}" if self.temperature else "greedy",
            "up to an end token" if self.stop == "eos" else "end tokens ignored",
            self.dtype,
            f"prefill routed by {self.routing.replace('_', ' ')}" if self.routing else "",
        )
        return ", ".join(part for part in parts if part)

    @property
    def short(self) -> str:
        """For file names: several panels may differ in nothing else."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:6]


@dataclass(frozen=True)
class TaskKey:
    """A benchmark at one length: lengths are columns of rows, and are not averaged together."""

    benchmark: str  # with its version
    length: Column | None = None  # None where rows carry none, or the benchmark's name tells it
    told: str = ""  # what tells it apart from others of its name, see `reports.names`

    @classmethod
    def of(cls, record: Record) -> TaskKey:
        named = "length" in record.key.benchmark_settings
        return cls(record.key.benchmark, None if named else record.columns.get("length"))

    def __str__(self) -> str:
        name = self.benchmark if self.length is None else f"{self.benchmark} {self.length}"
        return f"{name} ({self.told})" if self.told else name


@dataclass(frozen=True)
class PanelKey:
    """What stands in one table or one picture."""

    model: str  # a variant's own name, or its parent where variants stand side by side
    task: TaskKey
    protocol: Protocol

    @property
    def title(self) -> str:
        return f"{self.task}, {self.protocol.prompt}, {self.model}"

    @property
    def order(self) -> tuple[str, ...]:
        return (self.model, str(self.task), self.protocol.prompt, str(self.protocol))


@dataclass(frozen=True)
class Label:
    """What a line is called in tables and legends."""

    method: str  # with its settings
    mark: str = ""  # tells apart what bears the same name
    variant: str = ""
    causal: bool = False  # the prefill was routed by argmax

    @property
    def plain(self) -> str:
        """The method without settings."""
        return split_settings(self.method)[0]

    @property
    def has_settings(self) -> bool:
        return self.method != self.plain

    @property
    def name(self) -> str:
        """The method, told apart."""
        return f"{self.method}#{self.mark}" if self.mark else self.method

    @property
    def where(self) -> str:
        """On which variant, "" for none."""
        return (self.variant + " (argmax)" * self.causal).strip()

    @property
    def conversion(self) -> str:
        """The variant without its sizes: "gqa" of "gqa-2"."""
        return split_conversion(self.variant)[0]

    @property
    def is_full(self) -> bool:
        """Nothing evicted, whatever the variant."""
        return self.method == "full"

    def __str__(self) -> str:
        return f"{self.name} on {self.where}" if self.where else self.name


@dataclass(frozen=True)
class Shown:
    """What a line is called among the others of a report, see `reports.names`. Two lines with one name do not exist."""

    parent: str = ""  # the unconverted model
    variant: str = ""
    records: str = ""  # of a task, in words: which records and settings, where several bear its name
    answers: str = ""  # how it was answered, where that differs
    mark: str = ""  # of the method

    @property
    def told(self) -> str:
        return ", ".join(filter(None, (self.records, self.answers)))


@dataclass(frozen=True)
class LineKey:
    """What the rows of one line share: all of their key but example and seed, which are 0 here, and the length."""

    asked: Key
    length: Column | None = None
    shown: Shown = Shown()

    @classmethod
    def of(cls, record: Record) -> LineKey:
        return cls(replace(record.key, example=0, seed=0), TaskKey.of(record).length)

    @property
    def task(self) -> TaskKey:
        return TaskKey(self.asked.benchmark, self.length, self.shown.told)

    @property
    def plain_task(self) -> TaskKey:
        """Whatever it was asked of, and however it was answered."""
        return TaskKey(self.asked.benchmark, self.length)

    @property
    def parent(self) -> str:
        return self.shown.parent or self.asked.parent

    @property
    def model(self) -> str:
        variant = self.shown.variant or self.asked.variant
        return f"{self.parent}+{variant}" if variant else self.parent

    @property
    def protocol(self) -> Protocol:
        return Protocol.of(self.asked)

    @property
    def panel(self) -> PanelKey:
        return PanelKey(self.model, self.task, self.protocol)

    @property
    def label(self) -> Label:
        variant = self.shown.variant or self.asked.variant
        return Label(self.asked.method_name, self.shown.mark, variant, causal=self.asked.routing == "argmax")

    @property
    def question(self) -> LineKey:
        """The same for all methods and budgets."""
        asked = replace(self.asked, method="", params="", budget="")
        return replace(self, asked=asked, shown=replace(self.shown, mark=""))

    @property
    def cell(self) -> LineKey:
        """The same for all tasks that were asked in one way only: a method at a budget."""
        return LineKey(replace(self.asked, benchmark="", benchmark_params="", data="", max_new_tokens=0), shown=self.shown)

    @property
    def order(self) -> tuple[object, ...]:
        """Model, benchmark, protocol, method, budget; the full cache first."""
        key = self.asked
        shown = (self.model, str(self.task), key.prompt, str(self.protocol))
        hidden = (key.revision, key.benchmark_params, key.data, key.max_new_tokens, key.fidelity)
        return (*shown, *hidden, not self.label.is_full, key.method, key.params, budget_size(key.budget))
