"""Trains the embedded model from nothing: `python -m harness.training.reference_model --data-dir D --out FOLDER`.

A four-layer Llama that recalls facts from its context. Its retrieval heads form by themselves: no weight is planted. What
helps them form is the start (every query projection begins near its key projection, in every head of every layer alike:
Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", 2023) and repeated spans among the first documents.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from harness.engine.measure import keep_freed_memory
from harness.training.recipes import multiplies_bf16
from harness.training.reference_data import (
    ANSWER,
    ANSWER_OF_MANY,
    FILLER,
    REPEAT,
    TEMPLATE,
    VOCABULARY,
    Document,
    Documents,
    Plan,
    book_sentences,
    build_tokenizer,
)


@dataclass(frozen=True)
class Phase:
    """Steps on documents of some lengths."""

    name: str
    steps: int  # at most
    lengths: dict[int, float]  # tokens -> share of the steps
    repeats: float  # share of documents that are repeated spans
    short: tuple[float, float, float] = (0.2, 0.3, 0.5)  # shares of the kinds in SHORT, in documents of 64 tokens
    until: tuple[int, float] | None = None  # ends when the loss of a kind of token, over 50 steps, is below this


SHORT = (Plan(3, 0, 0), Plan(3, 2, 0), Plan(4, 0, 1))
LONG = {  # facts, links, questions for four: from, to
    128: ((4, 8), (0, 3), 1),
    256: ((4, 12), (2, 4), 2),
    512: ((6, 16), (3, 6), 3),
    1024: ((8, 22), (4, 8), 3),
    2048: ((8, 28), (4, 10), 4),
}
PHASES = (
    Phase("one code", 1500, {64: 1.0}, 0.25, (1.0, 0.0, 0.0), (ANSWER, 0.05)),
    Phase("every question", 1200, {64: 1.0}, 0.10, (0.2, 0.25, 0.55), (ANSWER_OF_MANY, 0.12)),
    Phase("128 tokens", 300, {64: 0.2, 128: 0.8}, 0.15),
    Phase("256 tokens", 350, {128: 0.3, 256: 0.7}, 0.10),
    Phase("512 tokens", 350, {128: 0.1, 256: 0.2, 512: 0.7}, 0.08),
    Phase("1024 tokens", 600, {256: 0.1, 512: 0.2, 1024: 0.55, 2048: 0.15}, 0.06),
)
NAMES = {ANSWER: "answers", ANSWER_OF_MANY: "answers of four", FILLER: "filler", TEMPLATE: "wording", REPEAT: "repeated spans"}
TOKENS = 4096  # a step
WEIGHTS = {ANSWER: 1.0, FILLER: 0.3, TEMPLATE: 0.1, REPEAT: 0.5, ANSWER_OF_MANY: 1.0}  # of each kind's mean loss
MUON_RATE, ADAM_RATE, WARM_STEPS, DECAY_STEPS = 0.02, 3e-3, 20, 1000


def new_model(seed: int) -> LlamaForCausalLM:
    """Queries near their keys; attention and MLP add nothing at first."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                zero = name.endswith(("o_proj.weight", "down_proj.weight"))
                weight.normal_(std=0.06 if "embed" in name else 0.0 if zero else config.hidden_size**-0.5)
        for layer in model.model.layers:
            query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
            spread = key.unflatten(0, (4, 1, 32)).expand(-1, 2, -1, -1).flatten(0, 2)  # [Hq * D, hidden]
            query.copy_(0.7 * spread + (1 - 0.7**2) ** 0.5 * query)
    return model


def loss_of(model: LlamaForCausalLM, documents: list[Document]) -> tuple[Tensor, dict[int, float]]:
    """The weighted sum of each kind's mean loss, and these means."""
    ids = torch.tensor([document.ids for document in documents])
    kinds = torch.tensor([document.kinds for document in documents])[:, 1:]
    with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(torch.device("cpu"))):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(kinds.shape)
    means = {kind: losses[kinds == kind].mean() for kind in WEIGHTS if bool((kinds == kind).any())}
    total = torch.stack([WEIGHTS[kind] * mean for kind, mean in means.items()]).sum()
    return total, {kind: float(mean.detach()) for kind, mean in means.items()}


def batch(documents: Documents, phase: Phase, tokens: int) -> list[Document]:
    rng = documents.rng
    length = rng.choices(list(phase.lengths), list(phase.lengths.values()))[0]
    return [_document(documents, rng, phase, length) for _ in range(max(1, tokens // length))]


def _document(documents: Documents, rng: random.Random, phase: Phase, length: int) -> Document:
    if rng.random() < phase.repeats:
        return documents.repeats(length)
    if length == 64:
        return documents.facts(length, rng.choices(SHORT, phase.short)[0])
    facts, links, many = LONG[length]
    return documents.facts(length, Plan(rng.randint(*facts), rng.randint(*links), rng.randint(0, many)))


def train(
    documents: Documents, phases: tuple[Phase, ...] = PHASES, seed: int = 0, tokens: int = TOKENS
) -> tuple[LlamaForCausalLM, list[dict[str, object]]]:
    """A phase with an aim ends when it is reached; the rate falls over the last steps of all."""
    model = new_model(seed)
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.0, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    history: list[dict[str, object]] = []
    step, start = 0, time.perf_counter()
    for number, phase in enumerate(phases):
        later = sum(other.steps for other in phases[number + 1 :])
        recent: list[dict[int, float]] = []
        bar = tqdm(range(phase.steps), desc=phase.name, file=sys.stderr)
        for done in bar:
            left = phase.steps - done + later
            rate = min(1.0, (step + 1) / WARM_STEPS, max(0.02, left / min(DECAY_STEPS, sum(p.steps for p in phases))))
            for optimizer, full in ((muon, MUON_RATE), (adam, ADAM_RATE)):
                optimizer.param_groups[0]["lr"] = full * rate
            loss, means = loss_of(model, batch(documents, phase, tokens))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            muon.step()
            adam.step()
            model.zero_grad()
            step += 1
            recent.append(means)
            if len(recent) == 50 or done == phase.steps - 1:
                means = {kind: mean for kind in WEIGHTS if (mean := _mean(recent, kind)) is not None}
                history.append({"phase": phase.name, "step": step, "seconds": time.perf_counter() - start, "loss": means})
                bar.set_postfix({NAMES[kind]: round(mean, 3) for kind, mean in means.items()})
                recent = []
                if phase.until and means.get(phase.until[0], 9.0) < phase.until[1]:
                    break
    return model.eval(), history


def _mean(recent: list[dict[int, float]], kind: int) -> float | None:
    found = [means[kind] for means in recent if kind in means]
    return sum(found) / len(found) if found else None


def draw(history: list[dict[str, object]], path: Path) -> None:
    """The loss of each kind of token over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for kind, name in NAMES.items():
        points = [(entry["step"], entry["loss"][kind]) for entry in history if kind in entry["loss"]]  # type: ignore[index, operator]
        axis.plot(*zip(*points, strict=True), label=name)
    axis.set(xlabel="step", ylabel="loss, nats a token", yscale="log", title="Training of the embedded model")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with lm/books/*.txt, public-domain books")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint, its tokenizer and the loss picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="(default: torch's own)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    try:
        books = book_sentences(options.data_dir / "lm" / "books", held_out=False)
    except FileNotFoundError as error:
        print(f"train_reference: {error}; name a folder with --data-dir", file=sys.stderr)
        return 2
    tokenizer = build_tokenizer(books)
    model, history = train(Documents(tokenizer, books, options.seed), seed=options.seed)
    half: Any = model.bfloat16()
    half.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    log = {"seed": options.seed, "phases": [asdict(phase) for phase in PHASES], "history": history}
    (options.out / "training.json").write_text(json.dumps(log, indent=1))
    draw(history, options.out / "loss.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
