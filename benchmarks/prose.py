"""English prose of our own making: filler without a licence to mind. Sentences never state a fact of `benchmarks.facts`."""

from __future__ import annotations

import random
from collections.abc import Iterator

WHO = (
    "the old miller|a young sailor|the night watchman|my grandmother|the village teacher|a tired traveller|"
    "the baker's daughter|an honest lawyer|the youngest brother|a quiet stranger|the captain|our neighbour|"
    "the gardener|a famous painter|the doctor|the stable boy|an elderly priest|the postman|a band of musicians|"
    "the queen's messenger|two fishermen|the innkeeper"
).split("|")
DID = (
    "walked slowly along|looked back towards|had long forgotten|was afraid of|wrote a letter about|"
    "painted a picture of|dreamed of|kept watch over|returned at last to|told a long story about|quarrelled over|"
    "turned away from|sang softly about|could not find|had never seen|was told to leave|stood for an hour before|"
    "spoke kindly of|grew weary of|set out for"
).split("|")
WHAT = (
    "the frozen river|the empty market square|a narrow stone bridge|the ruined abbey|the hills beyond the town|"
    "a field of barley|the harbour lights|a broken clock|the great oak tree|the road to the coast|an abandoned ship|"
    "the castle garden|the winter festival|a cellar full of apples|the silver mine|the lamp in the tower|"
    "a herd of grey horses|the ferry landing|the long war|a chest of letters|the wooden church|a flock of geese"
).split("|")
WHEN = (
    "In the early morning|Late that evening|During the harvest|On the third day|Before the snow came|"
    "After a long silence|When the bells had stopped|At the end of summer|Many years later|While the rain fell|"
    "Without a word|Against all advice|As everyone expected|For reasons of his own|Once more|Not long afterwards|"
    "Under a pale moon|That same week"
).split("|")
THEN = (
    "and nobody asked why|but the wind had changed|for there was nothing left to say|and the dogs began to bark|"
    "though it was already dark|because the harvest had failed|until the candles burned low|and the children laughed|"
    "while the others waited outside|so the matter was settled|yet something felt wrong|and the kettle began to sing|"
    "as if the whole world had fallen asleep|which surprised even the judge|and went home by another way|"
    "though the price was far too high"
).split("|")


def sentence(rng: random.Random) -> str:
    """One sentence, capital letter to full stop."""
    who, did, what = rng.choice(WHO), rng.choice(DID), rng.choice(WHAT)
    shape = rng.randrange(5)
    if shape == 0:
        text = f"{rng.choice(WHEN)}, {who} {did} {what}"
    elif shape == 1:
        text = f"{who} {did} {what}, {rng.choice(THEN)}"
    elif shape == 2:
        text = f"{rng.choice(WHEN)}, {who} {did} {what}, {rng.choice(THEN)}"
    elif shape == 3:
        text = f"{who} {did} {what} and {rng.choice(DID)} {rng.choice(WHAT)}"
    else:
        text = f"near {what}, {who} {did} {rng.choice(WHAT)}"
    return text[0].upper() + text[1:] + "."


def sentences(seed: str) -> Iterator[str]:
    """Endless, and the same for the same seed on any machine."""
    rng = random.Random(seed)
    while True:
        yield sentence(rng)
