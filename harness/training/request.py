"""A training as a request: a model converted, healed by a recipe, and saved as a variant."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import BadRequest
from harness.evaluation.request import DTYPES, at_least
from harness.evaluation.tokens import beyond
from harness.files import check_writable
from harness.registry import Registry
from harness.training.recipes import RECIPES, STARTS, Loss, NamedRecipe, Recipe, multiplies_bf16
from results.store import slug

if TYPE_CHECKING:
    import torch

    from harness.cache import Routing
    from harness.engine.model import Model
    from harness.models.variants import About
    from harness.training.data import ReferenceBatches
    from harness.training.loop import Batch, Batches, Progress
    from methods.mixsga_router import RouterLoss

REFERENCE_RECIPE = Recipe(steps=600, lr=3e-3)  # the embedded model is small: it stands higher rates
LENGTH, ROWS = 1024, 4  # of batches, where neither the request nor a recipe says otherwise
MEASURED = 8  # held-out batches on which routing is measured


@dataclass(frozen=True)
class TrainRequest:
    """What to train. Settings that are None are the recipe's.

    Raises:
        BadRequest: a field that makes no sense by itself.
    """

    model: str
    conversion: str  # as it is written in names: gqa-2, mixsga-3:1:6, none
    recipe: str | None = None  # a named one: mixsga-sft, mixsga-pretrain, mixsga-plus
    from_variant: Path | None = None  # folder of a variant of that model and conversion, whose weights the training begins with
    text: Path | None = None  # file or folder of .txt to heal on
    instruct: Path | None = None  # .jsonl with prompt and output to heal on
    data_dir: Path | None = None  # with the recipe's data; for the embedded model, with lm/books
    length: int | None = None  # tokens of a row of text
    rows: int | None = None  # of a batch
    epochs: float | None = None  # times through the recipe's data
    steps: int | None = None
    optimizer: Literal["adamw", "muon"] | None = None
    lr: float | None = None
    router_lr: float | None = None
    accumulate: int | None = None
    loss: Loss | None = None
    trains: Literal["all", "kv"] | None = None
    alpha: float | None = None
    router_loss: RouterLoss | None = None
    checkpointing: bool | None = None
    bf16: bool | None = None  # None: where the device multiplies bfloat16 faster than float32
    order: Literal["as_is", "likeness"] | None = None
    align: bool | None = None
    agree: float | None = None
    agree_on: Literal["kv", "k"] | None = None
    ramp: float | None = None
    soft: float | None = None
    routing: Routing | None = None
    layers: float | None = None
    save_every: int | None = None
    seed: int = 0
    shard_weights: bool = False  # with several processes: each holds a part of the weights (FSDP2)
    save_dtype: str = "bfloat16"
    out: Path | None = None  # folder of the variant; None: results/variants/<model>+<conversion>
    plugins: tuple[Path, ...] = ()
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        at_least(self, seed=0)
        for name in ("length", "rows", "epochs"):
            size = getattr(self, name)
            if size is not None and not size > 0:
                raise BadRequest(f"--{name} {size:g} must be above 0")
        if self.text and self.instruct:
            raise BadRequest("--text and --instruct exclude each other")
        if self.recipe is not None and self.recipe not in RECIPES and self.recipe not in STARTS:
            raise BadRequest(f"no recipe {self.recipe!r}; known: {', '.join((*RECIPES, *STARTS))}")
        if self.save_dtype not in DTYPES:
            raise BadRequest(f"no dtype {self.save_dtype!r}; known: {', '.join(DTYPES)}")
        recipe = self.settings()  # refuses what makes no sense before anything is loaded
        if self.from_variant is not None and (recipe.order != "as_is" or recipe.align or recipe.agree):
            raise BadRequest("--order, --align and --agree are for a parent's heads, and --from-variant begins behind them")

    @property
    def named(self) -> NamedRecipe | None:
        """With data and a length of its own."""
        return RECIPES.get(self.recipe or "")

    def settings(self, **more: Any) -> Recipe:
        """The recipe, with `more` and then what the request changes of it."""
        given = {field.name: value for field in fields(Recipe) if (value := getattr(self, field.name, None)) is not None}
        plain = REFERENCE_RECIPE if self.model == "reference" else Recipe()
        start = STARTS.get(self.recipe or "", ("", {}))[1]
        return replace(self.named.recipe if self.named else plain, **{**start, **more, **given})

    def arithmetic(self, device: torch.device) -> TrainRequest:
        """The same request, with it settled in which arithmetic matrices are multiplied on that device."""
        return self if self.bf16 is not None else replace(self, bf16=multiplies_bf16(device))


@dataclass(frozen=True)
class Trained:
    """A variant that was trained, and where it lies."""

    about: About
    folder: Path


@dataclass(frozen=True)
class Reading:
    """What is trained on."""

    recipe: Recipe
    batches: Batches
    text: str  # in words


def train(request: TrainRequest, registry: Registry) -> Trained | None:
    """Converts a model, heals it, and saves the variant. None in all but the first of several processes.

    Raises:
        UserError: the request makes no sense, or the training cannot go on.
    """
    from accelerate import PartialState

    from harness.engine.model import own_attention
    from harness.families import routers
    from harness.models.load import check_name, load_model, one_device
    from harness.training.loop import Course, heal
    from harness.training.starts import groups_of

    conversion = registry.conversion(request.conversion)
    check_name(request.model, registry)
    processes = PartialState(cpu=one_device(request.device, "training").type == "cpu")
    if request.shard_weights and processes.num_processes < 2:
        raise BadRequest("--shard-weights needs several processes: torchrun --nproc-per-node N run_all.py train ...")
    if processes.num_processes > 1:
        request = replace(request, device=str(processes.device))  # each its own
    model = load_model(request.model, request, registry)
    if model.is_variant:
        raise BadRequest(f"model {model.name} is a variant already: convert its parent")
    if model.tokenizer is None:
        raise BadRequest(f"model {model.name} has no tokenizer, so it cannot read a training text")
    groups_of(model.network, conversion)  # refused before data are read, which may take long
    request = request.arithmetic(model.device)
    reading = reading_of(request, model)
    out = request.out or Path("results/variants") / slug(f"{model.name}+{request.conversion}")
    teacher = copy.deepcopy(model.network) if reading.recipe.taught else None
    if teacher is not None:
        teacher.set_attn_implementation(own_attention(teacher))
    before = _converted(request, model, reading, registry)
    if (reading.recipe.ramp or reading.recipe.soft) and not routers(model.network):
        raise BadRequest(f"--ramp and --soft are for experts, and {request.conversion} has none")
    if processes.is_main_process:
        check_free(out)
    digest = getattr(reading.batches, "digest", "")
    about = f"{model.name} {model.revision} {request.conversion} {reading.text} {digest}" + (f" {before}" if before else "")
    course = Course(reading.recipe, reading.batches, teacher, about, request.shard_weights)
    progress = heal(model.network, course, out)
    return _saved(request, model, reading, progress, before, out, registry)


def _converted(request: TrainRequest, model: Model, reading: Reading, registry: Registry) -> dict[str, Any]:
    """Puts the conversion in the place of the model's network: made from it now, or as a variant was saved.

    Returns:
        Which variant that was, and how it had been trained; empty, if the parent was converted.

    Raises:
        BadRequest: a variant of another model or conversion; or see `prepare`.
    """
    import torch

    from harness.engine.model import own_attention
    from harness.models.variants import open_variant, read_about
    from harness.training.starts import prepare

    conversion, folder = registry.conversion(request.conversion), request.from_variant
    if folder is None:
        model.network.float().set_attn_implementation(own_attention(model.network))  # rotated weights are kept in float32
        prepare(model.network, conversion, reading.recipe, reading.batches)
        conversion.apply(model.network, reading.recipe.seed)
        return {}
    made = read_about(folder)
    if (made.parent, made.parent_revision, made.conversion) != (model.name, model.revision, request.conversion):
        raise BadRequest(
            f"--from-variant {folder} is {made.name} of revision {made.parent_revision}, "
            f"not {model.name}+{request.conversion} of {model.revision}"
        )
    network, _, digest = open_variant(folder, torch.float32, registry)
    model.network = network.to(model.device)  # type: ignore[arg-type]
    return {"revision": digest, "tokens": made.results.get("tokens", 0), "recipe": made.recipe}


def _saved(
    request: TrainRequest,
    model: Model,
    reading: Reading,
    progress: Progress,
    before: dict[str, Any],
    out: Path,
    registry: Registry,
) -> Trained | None:
    """Measures what was trained on the weights that are saved, and saves them.

    Args:
        before: of the variant that the training began with (`_converted`).
    """
    import torch
    from accelerate import PartialState

    from harness.families import routers
    from harness.models.variants import About, bytes_a_token, open_variant, save
    from harness.training.checkpoint import forget, sharded, whole_weights
    from harness.training.loop import routing_of

    dtype = getattr(torch, request.save_dtype)
    if not sharded(model.network):
        model.network.to(dtype).float()  # what is measured are the weights that are saved
    shape = replace(model.parent_shape, itemsize=4)
    share = bytes_a_token(shape, request.conversion, registry) / bytes_a_token(shape, "none", registry)
    results: dict[str, Any] = {
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "kv_share": round(share, 4),
        "losses": progress.losses,
    }
    if routers(model.network):
        results |= routing_of(model.network, _held_out(reading.batches, model.device))
    weights = None
    if sharded(model.network):
        weights = {name: weight.to(dtype) for name, weight in whole_weights(model.network).items()}
    else:
        model.network.to(dtype)
    if not PartialState().is_main_process:
        return None
    said = {"recipe": request.recipe, **asdict(reading.recipe), "trained_on": reading.text}
    if before:
        said["from_variant"] = before
    variant = About(model.name, model.revision, shape, request.conversion, said, results)
    save(model.network, model.tokenizer, variant, out, weights)
    open_variant(out, dtype, registry)  # refuses what does not come back as it was; the training's checkpoint is then still there
    forget(out)
    return Trained(variant, out)


def _held_out(batches: Batches, device: Any) -> Iterator[Batch]:
    from harness.training.data import HELD_OUT

    return (batches(HELD_OUT + number).to(device) for number in range(MEASURED))


def reading_of(request: TrainRequest, model: Model) -> Reading:
    """
    Raises:
        BadRequest: more tokens than the model has positions for, or nothing to heal on.
        BadText, BadData: a text that is missing, empty or too short.
    """
    from harness.training.corpora import dolly, minipile
    from harness.training.data import instruct_batches, text_batches

    named = request.named
    length = request.length or (min(named.length, model.max_tokens) if named else LENGTH)
    rows = request.rows or (named.rows if named else ROWS)
    if length > model.max_tokens:
        raise BadRequest(f"--length {length} is over the {model.max_tokens} positions of {model.name}")
    batches: Any
    sizes = (length, rows, request.seed)
    if path := request.text or request.instruct:
        read = text_batches if request.text else instruct_batches
        batches, text = read(model.tokenizer, path, *sizes), f"{path.name}, {rows} rows of {length} tokens"
    elif named:
        read_data = dolly if named.data == "dolly" else minipile
        batches = read_data(model.tokenizer, request.data_dir, *sizes)
        text = f"{named.data}, {rows} rows of at most {length} tokens"
    elif model.name == "reference":
        recipe = request.settings()
        text = "the embedded model's own documents" + (" and books" if request.data_dir else "")
        return Reading(recipe, _own_documents(request, model, recipe), text)
    else:
        raise BadRequest(f"model {model.name} needs --recipe, --text or --instruct to be healed on")
    if (why := beyond(batches.largest, model.vocabulary, model.tokenizer)) is not None:
        raise BadRequest(f"model {model.name} cannot be trained on this: {why}")
    return Reading(_for_data(request, rows, batches), batches, text)


def _for_data(request: TrainRequest, rows: int, batches: Any) -> Recipe:
    """The recipe; of a named one, steps and accumulation follow from how much there is to read."""
    from accelerate import PartialState

    if request.named is None:
        return request.settings()
    named = replace(request.named, epochs=request.epochs or request.named.epochs)
    accumulate = math.ceil(named.batch / (rows * PartialState().num_processes))
    return request.settings(steps=named.steps(int(batches.usable)), accumulate=accumulate)


def _own_documents(request: TrainRequest, model: Model, recipe: Recipe) -> ReferenceBatches:
    from harness.training.data import ReferenceBatches
    from harness.training.reference_data import Documents, book_sentences

    books: list[str] = []
    if request.data_dir:
        try:
            books = book_sentences(request.data_dir / "lm" / "books", held_out=False)
        except FileNotFoundError as error:
            raise BadRequest(f"--data-dir {request.data_dir}: {error}") from None
    documents = Documents(model.tokenizer, books, request.seed)  # type: ignore[arg-type]
    return ReferenceBatches(documents, request.seed, recipe.steps * recipe.accumulate)


def check_free(out: Path) -> None:
    """
    Raises:
        BadRequest: a finished variant lies there, or nothing can be written there.
    """
    from harness.models.variants import is_variant

    if is_variant(out):
        raise BadRequest(f"{out} holds a finished variant: remove it, or choose another folder with --out")
    check_writable(out)
