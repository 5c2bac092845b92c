"""How a method looks, the same in every figure: colour-blind safe, and told apart in grey by marker and dash."""

from __future__ import annotations

from dataclasses import dataclass

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
    filled: bool  # another setting of a method, or the same on a variant: its colour, not filled


def style_of(label: str) -> Style:
    """Of `snapkv`, `snapkv(kernel=5)` or `snapkv on gqa-2`."""
    plain, _, variant = label.partition(" on ")
    name, *setting = plain.split("#")[0].split("(")
    number = KNOWN.index(name) if name in KNOWN else len(KNOWN) + sum(map(ord, name))
    style, turn = number % len(COLOURS), number // len(COLOURS)
    dash = DASHES[(style + turn + sum(map(ord, variant))) % len(DASHES)]
    mark = VARIANTS.get(variant.split("-")[0], "P") if variant else MARKERS[(style + 3 * turn) % len(MARKERS)]
    return Style(COLOURS[style], mark, dash, not (setting or variant))


def order_of(label: str) -> tuple[int, str]:
    """In legends: known methods in their order, then others, then those on variants."""
    name = label.split(" on ")[0].split("#")[0].split("(")[0]
    return (len(KNOWN) * (" on " in label) + (KNOWN.index(name) if name in KNOWN else len(KNOWN)), label)
