"""How a method looks, the same in every figure: colour-blind safe, and told apart in grey by marker and dash."""

from __future__ import annotations

from dataclasses import dataclass

from reports.keys import Label

# Okabe and Ito's colours, less their yellow, which paper does not hold.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
VARIANTS = {"gqa": "s", "mqa": "^", "mixsga": "D", "none": "o", "cla": "v"}  # the mark of a conversion, for every method on it
KNOWN: tuple[str, ...] = ("random", "streaming_llm", "h2o", "tova", "knorm", "snapkv", "pyramidkv", "ada_snapkv")
KNOWN += ("headkv_r", "headkv_er", "headkv_r2", "headkv_paper", "full")


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    dash: str
    filled: bool  # another setting of a method, or the same on a variant: its colour, not filled, with a mark and dash of its own


def style_of(label: Label) -> Style:
    name = label.plain.partition("+")[0]  # the same method whose rows a storage packs: its colour, as another setting of it
    changed = label.has_settings or name != label.plain
    number = KNOWN.index(name) if name in KNOWN else len(KNOWN) + sum(map(ord, name))
    style, turn = number % len(COLOURS), number // len(COLOURS)
    settings = sum(map(ord, label.method[len(name) :])) % (len(MARKERS) - 1) + 1 if changed else 0
    dash = DASHES[(style + turn + settings + sum(map(ord, label.where))) % len(DASHES)]
    mark = VARIANTS.get(label.conversion, "P") if label.variant else MARKERS[(style + 3 * turn + settings) % len(MARKERS)]
    return Style(COLOURS[style], mark, dash, not (changed or label.variant))


def order_of(label: Label) -> tuple[int, str]:
    """In legends: known methods in their order, then others, then those on variants."""
    name = label.plain.partition("+")[0]
    known = KNOWN.index(name) if name in KNOWN else len(KNOWN)
    return (len(KNOWN) * bool(label.variant) + known, str(label))
