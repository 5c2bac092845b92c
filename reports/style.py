"""How a method looks, the same in every picture of a report: colour-blind safe, and told apart in grey by its marker.

Eight lines have a colour and a marker of their own; whoever else was measured is drawn thin and grey.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from reports.keys import Label

# Okabe and Ito's colours, less their yellow, which paper does not hold.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7B52AB")
MARKERS = ("o", "s", "^", "D", "v", "P", "h", "*")
GREY = "#B4BAC1"
MOST = len(COLOURS)  # lines in colour
FOR_OTHERS = 2  # of those for variants, and for storages, where there are some
KNOWN: tuple[str, ...] = ("random", "streaming_llm", "h2o", "tova", "knorm", "snapkv", "pyramidkv", "ada_snapkv")
KNOWN += ("headkv_r", "headkv_er", "headkv_r2", "headkv_paper", "full")
EVICTING, VARIANTS, STORAGES = "evicting methods", "variants of the model", "other storages"
KINDS = (EVICTING, VARIANTS, STORAGES)


def kind_of(label: Label) -> str:
    """Which panel a line belongs to: `snapkv+int4` evicts, but what is new about it is how it stores."""
    return VARIANTS if label.variant else STORAGES if "+" in label.plain else EVICTING


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str

    @property
    def grey(self) -> bool:
        return self.colour == GREY


@dataclass(frozen=True)
class Palette:
    """The styles of a report's lines."""

    styles: Mapping[Label, Style] = field(default_factory=dict)

    @classmethod
    def of(cls, placed: Mapping[Label, float]) -> Palette:
        """placed: of each line how far behind it usually is; the least are drawn in colour."""
        chosen = _chosen(sorted(placed, key=lambda label: (placed[label], order_of(label))))
        free = list(range(MOST))
        styles: dict[Label, Style] = {}
        for label in sorted(chosen, key=order_of):  # known methods keep their colour from report to report where they can
            wanted = KNOWN.index(label.plain) % MOST if label.plain in KNOWN else free[0]
            number = wanted if wanted in free else free[0]
            free.remove(number)
            styles[label] = Style(COLOURS[number], MARKERS[number])
        return cls(styles)

    def of_label(self, label: Label) -> Style:
        return self.styles.get(label, Style(GREY, ""))


def _chosen(ordered: Sequence[Label]) -> list[Label]:
    kinds: dict[str, list[Label]] = {kind: [label for label in ordered if kind_of(label) == kind] for kind in KINDS}
    others = [label for kind in KINDS[1:] for label in kinds[kind][:FOR_OTHERS]]
    chosen = [*kinds[EVICTING][: MOST - len(others)], *others]
    return [*chosen, *(label for label in ordered if label not in chosen)][:MOST]


def in_order(labels: Iterable[Label]) -> list[Label]:
    return sorted(set(labels), key=order_of)


def order_of(label: Label) -> tuple[int, str]:
    """In tables: known methods in their order, then others, then those on variants."""
    name = label.plain.partition("+")[0]  # a method whose rows a storage packs stands beside the method
    known = KNOWN.index(name) if name in KNOWN else len(KNOWN)
    return (len(KNOWN) * bool(label.variant) + known, str(label))
