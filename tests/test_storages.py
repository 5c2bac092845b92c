"""Storages: codes against their definitions in float64, bytes by hand, budgets in bytes, names, and what makes no sense."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from helpers import call, converted, read, small, tiny, tokens
from test_packed_rows import PACKED
from torch import Tensor

from harness.cache import Budget, ModelShape, keep_all
from harness.engine.attention import attend, attend_reference
from harness.engine.rows import compact
from harness.evaluation.prompts import Prompt, Protocol
from harness.evaluation.sweep import Cell, Sweep
from harness.registry import BUILTIN, UnknownChoice
from harness.storage import Storage, cannot_hold, entry_bytes, of_layer, row_bytes
from methods import METHODS
from methods.base import score_prefill
from methods.packed import Packed
from results.store import read_rows
from storages import STORAGES
from storages.bits import KNOWN, pack_bits, unpack_bits
from storages.integers import ByChannel, ByToken
from storages.turbo import Float8, Rotated, lloyd_max

PAGE = Path(__file__).parent.parent / "docs" / "methods" / "quantised.md"


def vectors(count: int, dim: int, seed: int = 0) -> Tensor:
    """Some channels ten times as large, as keys have them."""
    drawn = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.where(torch.arange(dim) % 7 == 3, 10.0, 1.0) + 0.5


@pytest.mark.parametrize("bits", KNOWN)
def test_codes_come_out_as_they_went_in(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 3, 64), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (5, 3, 8 * bits) and torch.equal(unpack_bits(packed, 64, bits), codes.float())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [0, 16])
def test_values_by_token_are_kivis_arithmetic(bits: int, group: int) -> None:
    """The published formula, number by number; scale and least as they are held, in float16."""
    codec, given = ByToken(bits, group), vectors(9, 64)
    found = codec.unpack(codec.pack(given[:, None]), 64)
    for token in range(9):
        for start in range(0, 64, group or 64):
            part = given[token, start : start + (group or 64)].double().numpy()
            scale, least = np.float16((part.max() - part.min()) / (2**bits - 1)), np.float16(part.min())
            codes = np.clip(np.round((part - float(least)) / float(scale)), 0, 2**bits - 1)
            wanted = codes * float(scale) + float(least)
            assert np.abs(found[token, start : start + len(part)].numpy() - wanted).max() < 1e-5


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_by_channel_are_kivis_arithmetic(bits: int) -> None:
    codec, given = ByChannel(bits, 8), vectors(24, 32)
    found = codec.unpack(codec.pack(given.view(3, 8, 32)), 32)
    for group in range(3):
        part = given[8 * group : 8 * group + 8].double().numpy()
        scale = np.float16((part.max(0) - part.min(0)) / (2**bits - 1)).astype(float)
        least = np.float16(part.min(0)).astype(float)
        wanted = np.clip(np.round((part - least) / scale), 0, 2**bits - 1) * scale + least
        assert np.abs(found[8 * group : 8 * group + 8].numpy() - wanted).max() < 1e-5


@pytest.mark.parametrize("bits", [3, 4])
def test_turbo_keys_are_the_nearest_levels_of_a_rotated_direction(bits: int) -> None:
    """In float64, the rotation by its definition, the level by trying all."""
    dim, given = 32, vectors(20, 32).double().numpy()
    codec = Rotated(bits)
    found = codec.unpack(codec.pack(torch.tensor(given, dtype=torch.float32)[:, None]), dim).double().numpy()
    rotation = np.array([[(-1) ** bin(i & j).count("1") for j in range(dim)] for i in range(dim)]) / np.sqrt(dim)
    levels = np.array(lloyd_max(bits)) / np.sqrt(dim)
    for vector, ours in zip(given, found, strict=True):
        norm = np.linalg.norm(vector)
        nearest = levels[np.abs((rotation @ vector / norm)[:, None] - levels).argmin(1)]
        wanted = norm * (rotation.T @ (nearest / np.linalg.norm(nearest)))
        assert np.abs(ours - wanted).max() < 1e-3 * norm  # the factor is held in float16


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_the_best_for_a_normal_distribution(bits: int) -> None:
    """Each is the mean of what lies nearest to it: by numeric integration."""
    levels, x = np.array(lloyd_max(bits)), np.linspace(-9, 9, 400_001)
    owner, density = np.abs(x[:, None] - levels).argmin(1), np.exp(-x * x / 2)
    means = np.bincount(owner, x * density) / np.bincount(owner, density)
    assert np.abs(means - levels).max() < 1e-4 and np.allclose(levels, -levels[::-1])


def test_float8_is_torchs_and_saturates() -> None:
    given = torch.tensor([[0.0, 1.0, -3.3, 0.01, 1000.0, -1e9, 448.0, 2**-9]])
    found = Float8().unpack(Float8().pack(given[:, None]), 8)
    assert torch.equal(found, given.clamp(-448, 448).to(torch.float8_e4m3fn).float()) and found[0, 4] == 448


@pytest.mark.parametrize("name", STORAGES)
def test_constant_and_huge_vectors_stay_finite(name: str) -> None:
    for codec in (STORAGES[name].keys, STORAGES[name].values):
        for value in (0.0, 1.0, -3e4, 6e5):
            parts = codec.pack(torch.full((2, codec.tokens, 32), value))
            assert torch.isfinite(codec.unpack(parts, 32)).all()


def test_bytes_of_one_head_are_those_worked_out_on_the_page() -> None:
    """Every line of the page's table is what the code counts, and what is allocated where there is no slack."""
    rows = re.findall(r"^\| `([\w()=,-]+)` \|.*\| ([\d,]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) >= len(STORAGES)
    for name, told in rows:
        storage = BUILTIN.method(name)[1].storage  # type: ignore[attr-defined]
        assert row_bytes(storage, 300, 64) == int(told.replace(",", "")), name


def bytes_of(kept, storage: Storage, dim: int) -> int:
    return sum(row_bytes(row.storage, len(row.kept) if row.kept is not None else 60, dim) for rows in kept for row in rows)


@pytest.mark.parametrize("method", ["snapkv", "ada_snapkv"])
@pytest.mark.parametrize("name", [name for name in PACKED if name != "16 bits"])
def test_a_budget_is_bytes_and_is_spent(name: str, method: str) -> None:
    """At most the budget, and one entry more would not fit."""
    storage = replace(PACKED[name], spared=1) if name == "int4" else replace(PACKED[name], spared=0)  # type: ignore[type-var]
    prefill = read("llama", tokens(60))
    inner, shape = METHODS[method], prefill.shape
    packed = Packed(inner, storage)
    scores = score_prefill(inner.scorer, prefill)  # type: ignore[arg-type]
    tried = 0
    for text in ("17", "33%", "50%"):
        budget = Budget.parse(text)
        if packed.cannot_run(shape, budget, 60, "kv"):
            continue
        total = budget.entries(shape, 60, "kv")
        kept, allowed = packed.compress(prefill, total, scores), total * 2 * shape.head_dim * 2
        held = compact(prefill, [kept], 0).counts()[0]
        assert held.bytes_kept == bytes_of(kept, storage, shape.head_dim) <= allowed
        if held.entries < 60 * 6:
            more = inner.compress(prefill, held.entries + 1, scores)
            more = tuple(tuple(replace(r, storage=of_layer(storage, n, 3)) for r in rows) for n, rows in enumerate(more))
            assert bytes_of(more, storage, shape.head_dim) > allowed
        tried += 1
    assert tried >= 2


def test_a_cell_of_fewer_bits_is_counted_against_the_cache_that_is_deployed() -> None:
    prompt, cells = Prompt(tokens(60).tolist(), 60), []
    for text, budget in (
        ("full", None),
        ("int8", None),
        ("snapkv", "25%"),
        ("snapkv+int4", "25%"),
        ("snapkv+kivi-4(group=4,residual=8)", "50%"),
    ):
        name, method = BUILTIN.method(text)
        cells.append(Cell(name, method, Budget.parse(budget) if budget else None))
    found = {cell.name: outcome for cell, outcome in Sweep(tiny("llama"), Protocol()).example(prompt, cells, 20)}
    alone = {c.name: o for cell in cells for c, o in Sweep(tiny("llama"), Protocol()).example(prompt, [cell], 20)}
    assert [found[c.name].packed for c in cells] == [False, True, False, True, True]
    for cell in cells:
        assert found[cell.name].counts == alone[cell.name].counts and not found[cell.name].failed
        assert found[cell.name].answer.tokens == alone[cell.name].answer.tokens  # type: ignore[union-attr]
    whole = 60 * 6 * 2 * 16 * 2
    assert found["int8"].counts.bytes_kept == 60 * 6 * entry_bytes(STORAGES["int8"], 16)  # type: ignore[union-attr]
    assert whole / 4 - 24 < found["snapkv+int4"].counts.bytes_kept <= whole / 4  # type: ignore[union-attr]
    assert found["snapkv"].counts.bytes_kept == 2 * whole / 4 and found["int8"].compressed  # type: ignore[union-attr]


@pytest.mark.parametrize("granularity", ["kv", "query"])
@pytest.mark.parametrize("name", ["int4", "kivi-4"])
@pytest.mark.parametrize("which", ["gemma2", "opt+gqa-2", "llama+mixsga-3:1:6", "qwen3+cla-50"])
def test_a_model_reads_what_its_packed_rows_stand_for(
    which: str, name: str, granularity: Literal["kv", "query"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conversions too: logits are those of attention over everything dequantised, one token at a time, and of rows packed alone.

    Two cells keep more than a head holds, so that it is packed once for both; each keeps what it kept before.
    """
    family, _, variant = which.partition("+")
    model = converted(family, variant) if variant else tiny(family)
    prefill = model.prefill(tokens(60), METHODS["ada_snapkv"].needs)[0].at(granularity)
    total = Budget.parse("40").entries(prefill.shape, 60, granularity)
    kept = METHODS["ada_snapkv"].compress(prefill, total, score_prefill(METHODS["ada_snapkv"].scorer, prefill))  # type: ignore[attr-defined]
    rows = tuple(tuple(replace(row, storage=PACKED[name]) for row in layer) for layer in kept)
    said = []
    for attention, cells in ((attend_reference, 1), (attend, 1), (attend, 2)):
        monkeypatch.setattr("harness.engine.model.attend", attention)
        cache = compact(prefill, [rows] * cells, 20)
        said.append(torch.stack([model.decode(cache, tokens(1, seed=n).expand(cells, 1))[0, -1] for n in range(20)]))
    assert torch.allclose(said[1], said[0], atol=2e-4) and torch.allclose(said[2], said[0], atol=2e-4)
    plain = compact(prefill, [kept], 20)
    assert not torch.allclose(model.decode(plain, tokens(1, seed=0)[None])[0, -1], said[0][0], atol=1e-2)


def test_spared_layers_stay_in_16_bits_and_count_so() -> None:
    """The first and the last of three layers: 60 entries of two heads of size 16, by hand, as bytes and as what lies there."""
    prefill, storage = read("llama", tokens(60)), STORAGES["turbo-3"]
    kept = Packed(METHODS["full"], replace(storage, spared=1)).compress(prefill, 0, None)  # type: ignore[type-var]
    cache = compact(prefill, [kept], 0)
    in_16_bits, packed = 60 * 2 * 2 * 16 * 2, 60 * 2 * ((6 + 2) + (6 + 2 + 2))
    assert cache.counts()[0].bytes_kept == 2 * in_16_bits + packed
    for number, (part, kv) in enumerate(zip(cache.parts, prefill.layers, strict=True)):
        keys, _ = part.packed.seen(0, 60, 60)  # type: ignore[union-attr]
        exact = torch.equal(keys, kv.keys[0].half().float())
        assert exact == (number != 1)
    assert [of_layer(STORAGES["turbo-3"], layer, 8) is STORAGES["turbo-3"] for layer in range(8)] == [False] * 2 + [True] * 4 + [
        False
    ] * 2


def test_names_and_settings() -> None:
    label, method = BUILTIN.method("snapkv(kernel=5)+kivi-4(residual=64)")
    assert label == "snapkv(kernel=5)+kivi-4(residual=64)" and method.takes_budget
    assert method == Packed(BUILTIN.method("snapkv(kernel=5)")[1], replace(STORAGES["kivi-4"], residual=64))  # type: ignore[type-var]
    assert BUILTIN.method("h2o:pyramid+int4")[0] == "h2o:pyramid+int4"
    alone, full = BUILTIN.method("int4"), BUILTIN.method("full+int4")
    assert alone == full and alone[0] == "int4" and not alone[1].takes_budget and not alone[1].is_reference
    for text, why in (
        ("snapkv+int5", "no storage 'int5'; known: int8"),
        ("int4(bits=5)", "no codes of 5 bits"),
        ("kivi-4(group=48)", "no multiple of the 48 tokens"),
        ("kivi-4(residual=8)", "cannot hold a group of 32"),
        ("snapkv+int4+int8", "names 2 storages"),
        ("turbo-3(key_bits=5)", "no codes of 5 bits"),
    ):
        with pytest.raises(UnknownChoice, match=re.escape(why)):
            BUILTIN.method(text)


def test_what_cannot_be_held_says_so() -> None:
    shape = ModelShape(4, 8, 4, 80, (None,) * 4, 4)
    whole = Budget(share=Fraction(1))
    for text, why in (
        ("turbo-3", "this model has 4: nothing would be packed"),
        ("turbo-3(spared=0)", "power of two"),
        ("kivi-4", "groups of 32 do not divide a head of size 80"),
        ("int4(group=32)", "groups of 32 do not divide"),
    ):
        assert why in str(BUILTIN.method(text)[1].cannot_run(shape, whole, 500, "kv"))
    narrow = replace(shape, head_dim=64)
    kivi = BUILTIN.method("snapkv+kivi-4")[1]
    assert "newest 128 that stay in 16 bits" in str(kivi.cannot_run(narrow, Budget.parse("100"), 500, "kv"))
    assert kivi.cannot_run(narrow, Budget.parse("129"), 500, "kv") is None
    tight = BUILTIN.method("snapkv+int4")[1]
    assert "cannot hold the 8 protected" in str(tight.cannot_run(narrow, Budget.parse("1"), 500, "kv"))
    assert tight.cannot_run(narrow, Budget.parse("3"), 500, "kv") is None  # three in 16 bits are ten in four
    assert cannot_hold(STORAGES["int4"], 64) is None


def test_a_run_fills_one_byte_axis(tmp_path: Path) -> None:
    methods = "full,int8,snapkv,snapkv+int4,turbo-3,kivi-2"
    assert call(*small(tmp_path, "--methods", methods, "--budgets", "25%", "--prompt", "question_in")) == 0
    rows = read_rows(tmp_path)
    shares = {row.key.method_name: row.bytes_kept / row.bytes_full for row in rows if row.bytes_kept and row.bytes_full}
    assert shares["full"] == 1 and 0.23 < shares["snapkv+int4"] <= 0.25 == shares["snapkv"] and shares["int8"] == 0.625
    assert {row.status for row in rows if row.key.method_name == "turbo-3"} == {"skipped"}


def test_the_prefill_is_not_written_to() -> None:
    prefill = read("llama", tokens(50))
    before = [part.clone() for kv in prefill.layers for part in (kv.keys, kv.values)]
    for storage in PACKED.values():
        cells = tuple(tuple(replace(row, storage=storage) for row in rows) for rows in keep_all(prefill))
        cache = compact(prefill, [cells], 30)
        tiny("llama").decode(cache, tokens(20, seed=random.Random(1).randrange(9))[None])
    assert all(torch.equal(a, b) for a, b in zip(before, (p for kv in prefill.layers for p in (kv.keys, kv.values)), strict=True))
