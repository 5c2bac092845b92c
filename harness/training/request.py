"""`run_all.py train`: a model converted, healed by a recipe, and saved as a variant."""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from harness.engine.model import Model, own_attention
from harness.evaluation.plan import BadRequest
from harness.evaluation.request import device_of, load_model
from harness.families import routers
from harness.models.load import check_name
from harness.models.variants import About, bytes_a_token, conversion_of, is_variant, save
from harness.training.checkpoint import forget, sharded, whole_weights
from harness.training.data import HELD_OUT, ReferenceBatches, instruct_batches, text_batches
from harness.training.loop import Batches, Recipe, heal, routing_of
from harness.training.recipes import RECIPES, NamedRecipe, dolly, minipile
from harness.training.reference_data import Documents, book_sentences
from methods import CONVERSIONS
from results.store import slug

REFERENCE_RECIPE = Recipe(steps=600, lr=3e-3)  # the embedded model is small: it stands higher rates
LENGTH, ROWS = 1024, 4  # of batches, where neither the command nor a recipe says otherwise


@dataclass(frozen=True)
class Course:
    """How a model is to be healed, and on what."""

    recipe: Recipe
    batches: Batches
    text: str  # what it is trained on, in words


def train_request(options: argparse.Namespace) -> tuple[About, Path] | None:
    """Converts a model, heals it, and saves the variant. None in all but the first of several processes.

    Raises:
        BadRequest, BadVariant, CannotConvert, CannotTrain, BadText, BadData: the request makes no sense, or cannot go on.
    """
    text = conversion_text(options)
    conversion = conversion_of(text)
    named = named_recipe(options)
    _recipe(options, named)  # refuses what makes no sense before anything is loaded
    check_name(options.model)
    processes = PartialState(cpu=device_of(options.device).type == "cpu")
    if options.shard_weights and processes.num_processes < 2:
        raise BadRequest("--shard-weights needs several processes: torchrun --nproc-per-node N run_all.py train ...")
    if processes.num_processes > 1:
        options.device = str(processes.device)  # each its own
    model = load_model(options, options.model)
    if "+" in model.name:
        raise BadRequest(f"model {model.name} is a variant already: convert its parent")
    if model.tokenizer is None:
        raise BadRequest(f"model {model.name} has no tokenizer, so it cannot read a training text")
    course = course_of(options, model, named)
    recipe = course.recipe
    out = options.out or Path("results/variants") / slug(f"{model.name}+{text}")
    teacher = copy.deepcopy(model.network) if recipe.loss == "distill" else None
    if teacher is not None:
        teacher.set_attn_implementation(own_attention(teacher))
    conversion.apply(model.network, recipe.seed)
    if processes.is_main_process:
        check_free(out)
    said = {"recipe": options.recipe, **asdict(recipe), "trained_on": course.text}
    about = f"{model.name} {model.revision} {text} {course.text} {getattr(course.batches, 'digest', '')}"
    progress = heal(model.network, course.batches, recipe, out, teacher, about, options.shard_weights)
    saved = getattr(torch, options.save_dtype)
    if not sharded(model.network):
        model.network.to(saved).float()  # what is measured are the weights that are saved
    held_out = (course.batches(HELD_OUT + number).to(model.device) for number in range(8))
    shape = replace(model.parent_shape, itemsize=4)
    results: dict[str, Any] = {
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "kv_share": round(bytes_a_token(shape, text) / bytes_a_token(shape, "none"), 4),
        "losses": progress.losses,
    }
    if routers(model.network):
        results |= routing_of(model.network, held_out)
    weights = None
    if sharded(model.network):
        weights = {name: weight.to(saved) for name, weight in whole_weights(model.network).items()}
    else:
        model.network.to(saved)
    if not processes.is_main_process:
        return None
    variant = About(model.name, model.revision, shape, text, said, results)
    save(model.network, model.tokenizer, variant, out, weights)
    forget(out)
    return variant, out


def conversion_text(options: argparse.Namespace) -> str:
    """The conversion as it is written in names."""
    if options.conversion not in CONVERSIONS:
        raise BadRequest(f"no conversion {options.conversion!r}; known: {', '.join(CONVERSIONS)}")
    needed = CONVERSIONS[options.conversion].numbers
    numbers = str(getattr(options, needed) or "") if needed else ""
    if needed and not numbers:
        raise BadRequest(f"--conversion {options.conversion} needs --{needed}")
    if "-" in numbers:
        raise BadRequest(f"--{needed} {numbers} must not be negative")
    return "-".join(part for part in (options.conversion, numbers, options.ablation) if part)


def named_recipe(options: argparse.Namespace) -> NamedRecipe | None:
    if options.recipe is None:
        return None
    if options.recipe not in RECIPES:
        raise BadRequest(f"no recipe {options.recipe!r}; known: {', '.join(RECIPES)}")
    return RECIPES[options.recipe]


def _recipe(options: argparse.Namespace, named: NamedRecipe | None, **more: Any) -> Recipe:
    """The recipe, with what the command line changes of it."""
    names = {field.name for field in fields(Recipe)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    plain = REFERENCE_RECIPE if options.model == "reference" else Recipe()
    try:
        return replace(named.recipe if named else plain, **{**more, **given})
    except ValueError as error:
        raise BadRequest(str(error)) from None


def course_of(options: argparse.Namespace, model: Model, named: NamedRecipe | None) -> Course:
    """
    Raises:
        BadRequest: sizes that make no sense, or nothing to heal on.
        BadText, BadData: a text that is missing, empty or too short.
    """
    length = options.length or (min(named.length, model.max_tokens) if named else LENGTH)
    rows = options.rows or (named.rows if named else ROWS)
    for name, size in (("length", options.length), ("rows", options.rows), ("epochs", options.epochs)):
        if size is not None and size <= 0:
            raise BadRequest(f"--{name} {size:g} must be above 0")
    if length > model.max_tokens:
        raise BadRequest(f"--length {length} is over the {model.max_tokens} positions of {model.name}")
    if options.text and options.instruct:
        raise BadRequest("--text and --instruct exclude each other")
    batches: Any
    sizes = (length, rows, options.seed)
    if options.text or options.instruct:
        read = text_batches if options.text else instruct_batches
        path = options.text or options.instruct
        batches, text = read(model.tokenizer, path, *sizes), f"{path.name}, {rows} rows of {length} tokens"
    elif named:
        read_data = dolly if named.data == "dolly" else minipile
        batches = read_data(model.tokenizer, options.data_dir, *sizes)
        text = f"{named.data}, {rows} rows of at most {length} tokens"
    elif model.name == "reference":
        recipe = _recipe(options, None)
        text = "the embedded model's own documents" + (" and books" if options.data_dir else "")
        return Course(recipe, _own_documents(options, model, recipe), text)
    else:
        raise BadRequest(f"model {model.name} needs --recipe, --text or --instruct to be healed on")
    if named is None:
        return Course(_recipe(options, None), batches, text)
    named = replace(named, epochs=options.epochs or named.epochs)
    at_once = rows * PartialState().num_processes
    accumulate = math.ceil(named.batch / at_once)
    return Course(_recipe(options, named, steps=named.steps(rows_of(batches)), accumulate=accumulate), batches, text)


def rows_of(batches: Any) -> int:
    """Of one time through the data."""
    return int(batches.usable)


def _own_documents(options: argparse.Namespace, model: Model, recipe: Recipe) -> ReferenceBatches:
    books: list[str] = []
    if options.data_dir:
        try:
            books = book_sentences(options.data_dir / "lm" / "books", held_out=False)
        except FileNotFoundError as error:
            raise BadRequest(f"--data-dir {options.data_dir}: {error}") from None
    documents = Documents(model.tokenizer, books, options.seed)  # type: ignore[arg-type]
    return ReferenceBatches(documents, options.seed, recipe.steps * recipe.accumulate)


def check_free(out: Path) -> None:
    """
    Raises:
        BadRequest: a finished variant lies there, or nothing can be written there.
    """
    if is_variant(out):
        raise BadRequest(f"{out} holds a finished variant: remove it, or choose another folder with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".try").touch()
        (out / ".try").unlink()
    except OSError as error:
        raise BadRequest(f"cannot write to {out}: {error.strerror}; choose another folder with --out") from None
