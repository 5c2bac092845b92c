"""What the harness does with every family of transformers' decoders, measured on tiny random configurations.

`python -m harness.models.tried` measures all of them and writes `harness/models/tried.json`, which `list models` reads, and
docs/models.md; names of families as arguments: only shows these. A family that is not here is measured like any other when one
of its models is loaded: this is a table of what was seen, no list of what is let in.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from harness.cache import Needs, keep_all
from harness.engine.model import Model
from harness.engine.reach import refuse_config
from harness.engine.rows import compact
from harness.engine.self_check import self_check
from harness.engine.static_decode import StaticDecode
from harness.errors import UserError
from harness.families import shape_of
from harness.files import whole
from harness.models.tiny import TINY
from harness.registry import BUILTIN

TABLE = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
CONVERSIONS = ("gqa-2", "mixsga-1:1", "cla-50")  # one of each kind
READ, STEPS = 40, 6  # tokens of a prompt, and of an answer over static buffers


@dataclass(frozen=True)
class Tried:
    """What became of one family. `refused`: why none of its models runs."""

    family: str
    logits_within: float | None = None  # of the model's own, as a share of their spread: full cache, evicted, far
    graph: str = ""  # "yes", or why a step over static buffers cannot be captured
    conversions: tuple[str, ...] = ()
    not_converted: str = ""  # why not
    refused: str = ""


def config_of(family: str) -> Any:
    """The tiny configuration of a family."""
    base, own = TINY[""], TINY[family]
    kind = CONFIG_MAPPING[family]
    known = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__dataclass_fields__", {}))
    settings = {name: value for name, value in base.items() if name in known} | own
    return AutoConfig.for_model(family, **settings)


def network_of(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of a family with random weights, large enough that attention is far from uniform."""
    config = config_of(family)
    refuse_config("tiny", config)
    torch.manual_seed(seed)
    network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.15)
            elif name.endswith("sinks"):
                weight.normal_()
    return network.eval()  # type: ignore[no-any-return]


def tried(family: str) -> Tried:
    """Measures one family."""
    try:
        model = Model(network_of(family), None, "tiny", "0")
        within = self_check(model)["logits_within"]
    except UserError as refusal:
        return Tried(family, refused=_why(refusal, family))
    done, reasons = [], {}
    for text in CONVERSIONS:
        try:
            _convert(family, text)
            done.append(text)
        except UserError as refusal:
            reasons[_why(refusal, family)] = text
    return Tried(family, within, captured(model), tuple(done), "; ".join(reasons))


def _why(refusal: UserError, family: str) -> str:
    """The reason alone: whose it is, is said beside it."""
    return str(refusal).removeprefix(f"model 'tiny' is of the family {family!r}").lstrip(",: ")


def _convert(family: str, text: str) -> None:
    network = network_of(family)
    parent = shape_of(network)
    BUILTIN.conversion(text).apply(network)
    self_check(Model(network, None, "tiny", "0", parent))


class OnTheDevice(TorchDispatchMode):
    """Notes operations of a step that a CUDA graph cannot hold: what follows from numbers that are read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func is torch.ops.aten.index.Tensor and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:])
        )
        if masks or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.read.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def captured(model: Model) -> str:
    """Can a step over static buffers be captured, and does it say what the other says? "yes", or why not."""
    ids = torch.arange(READ) * 7 % (model.config.vocab_size - 3) + 3
    caches = []
    for _ in range(2):
        prefill = model.prefill(ids, Needs())[0]
        caches.append(compact(prefill, [keep_all(prefill)] * 2, STEPS))
    first = prefill.logits.argmax().expand(2)
    plain, token = [], first[:, None]
    for _ in range(STEPS):
        token = model.decode(caches[0], token)[:, -1].argmax(-1, keepdim=True)
        plain.append(token[:, 0].tolist())
    static = StaticDecode(model, caches[1], first, STEPS)
    with OnTheDevice() as mode:
        said = [static.step().tolist() for _ in range(STEPS)]
    if said != plain:
        return "says other tokens"
    return f"no: {', '.join(sorted(mode.read))} on the host" if mode.read else "yes"


def known() -> list[Tried]:
    """The table as it was measured last."""
    found = json.loads(TABLE.read_text())["families"]
    return [Tried(**{**one, "conversions": tuple(one["conversions"])}) for one in found]


ABOUT = """# Model families

Made by `python -m harness.models.tried` from tiny random configurations; not to be edited by hand.

Of {tried} families of transformers {version}'s decoders, {reached} are reached. It is a table of what was seen, no list that the
harness asks: every model is measured when it is loaded. Its own logits are compared with those of a prefill, of decoding over
rows with the full cache, of decoding with a part of every row evicted (against masked attention), and of tokens far behind their
prompt; the mask of every layer is compared as a rule, around the edges of its window. Where rows do not say what the model says
itself, it is refused with the number; what was found stands in the environment of the rows (`<out>/env/`).

Decoding and every eviction are right, or the family is refused. *Within* is the largest difference of logits as a share of their
spread, in float32; *graph* tells whether a step over static buffers reads no number on the host, so that `--decode graph` can
capture it; *conversions* are those that came out right: GQA (and MQA), mixSGA, CLA, found by what an attention layer holds.
"""
HEAD = ("| family | within | graph | conversions |", "|---|---|---|---|")


def page(found: list[Tried], version: str) -> str:
    """docs/models.md."""
    reached, refused = ([one for one in found if bool(one.refused) is no] for no in (False, True))
    lines = [ABOUT.format(tried=len(found), version=version, reached=len(reached)), *HEAD]
    for one in reached:
        which = ", ".join(text.split("-")[0] for text in one.conversions)
        lines.append(
            f"| {one.family} | {one.logits_within:.0e} | {one.graph} | {'; '.join(filter(None, (which, one.not_converted)))} |"
        )
    lines += ["", "Refused, each with what is said of it:", "", "| family | reason |", "|---|---|"]
    lines += [f"| {one.family} | {one.refused} |" for one in refused]
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    found = []
    for family in names or [name for name in TINY if name]:
        found.append(tried(family))
        print(json.dumps(asdict(found[-1])), file=sys.stderr)
    if names:
        return
    version = transformers.__version__
    with whole(TABLE) as draft:
        rows = ",\n".join(json.dumps(asdict(one)) for one in found)
        draft.write_text(f'{{"transformers": "{version}", "families": [\n{rows}\n]}}\n')
    with whole(PAGE) as draft:
        draft.write_text(page(found, version))


if __name__ == "__main__":
    main(sys.argv[1:])
