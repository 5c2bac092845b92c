"""Settings of all tests, the family fixture, and the marker `data` for tests that need real records."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run without a GPU; read when triton is imported

import pytest
import torch
from helpers import DATA, MAIN

torch.set_num_threads(1)


@pytest.fixture(params=MAIN)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def svg_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of scores are drawn as SVG, unless a test asks for more: packing the pixels of a PNG takes long."""
    monkeypatch.setattr("reports.write.USUAL", ("svg",))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `data` are skipped where the folder of real records is not beside the checkout."""
    if not DATA.is_dir():
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason=f"real records are looked for in {DATA.parent.name}/{DATA.name}"))
