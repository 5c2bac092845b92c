"""Data from the hub: what is asked for, and that it is read as the local file is. No test goes online; the client is replaced."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks import BENCHMARKS, data
from benchmarks.babilong import BabiLong
from benchmarks.data import BadData
from benchmarks.instruct import Instruct
from benchmarks.loogle import LooGLE

COMMIT = "0" * 39 + "a"
Hub = Callable[[dict[tuple[str, str], bytes]], list[tuple[str, str]]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Files by (repository, path); gives the list of what was asked for."""

    def serve(files: dict[tuple[str, str], bytes]) -> list[tuple[str, str]]:
        asked: list[tuple[str, str]] = []

        def download(repository: str, file: str, repo_type: str, revision: str) -> str:
            assert repo_type == "dataset" and revision
            asked.append((repository, file))
            if (repository, file) not in files:
                raise OSError("404 Client Error")
            path = tmp_path / f"datasets--{repository.replace('/', '--')}" / "snapshots" / COMMIT / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[repository, file])
            return str(path)

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        data.load.cache_clear()
        data.text.cache_clear()
        return asked

    return serve


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer)
    return buffer.getvalue()


def test_babilong_is_one_parquet_file_a_task_and_length(hub: Hub) -> None:
    row = {"input": "John went to the office.", "question": "Where is John?", "target": "office"}
    asked = hub({("RMT-team/babilong", "2k/qa1-00000-of-00001.parquet"): parquet([row] * 3)})
    task = BabiLong(task=1, length="2k")
    assert task.size == 3 and task.records().rows[0] == row
    assert asked == [("RMT-team/babilong", "2k/qa1-00000-of-00001.parquet")]
    assert task.records().source == f"RMT-team/babilong@{COMMIT}/2k/qa1-00000-of-00001.parquet"
    with pytest.raises(BadData, match="404"):
        BabiLong(task=2, length="2k").records()


def test_wikitext_is_joined_from_its_lines(hub: Hub) -> None:
    rows = [{"text": " = A title = \n"}, {"text": ""}, {"text": " Some words .\n"}]
    hub({("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet"): parquet(rows)})
    found = data.text("wikitext2", None)
    assert found.rows[0]["text"] == " = A title = \n Some words .\n" and COMMIT in found.source


def test_instruction_sets_are_minillms_lines(hub: Hub) -> None:
    row = {"instruction": "Name a bird.", "prompt": "Name a bird.\nAnswer:", "output": ["A duck"]}
    hub({("MiniLLM/dolly", "valid.jsonl"): (json.dumps(row) + "\n").encode()})
    assert Instruct("dolly").records().rows == (row,)


def test_loogle_and_longbench_are_asked_for_by_their_own_names(hub: Hub) -> None:
    asked = hub({})
    for task in (LooGLE("short_qa"), LooGLE("timeline"), BENCHMARKS["longbench_qasper"]):
        with pytest.raises(BadData, match="not reachable"):
            task.records()  # type: ignore[attr-defined]
    assert asked[0][0] == asked[1][0] == "bigai-nlco/LooGLE" and asked[2] == ("zai-org/LongBench", "data.zip")


def test_a_member_of_an_archive(hub: Hub) -> None:
    task: Any = BENCHMARKS["longbench_qasper"]
    asked = hub({})
    with pytest.raises(BadData):
        task.records()
    ((repository, archive),) = asked
    fields = {"input": "q", "context": "c", "answers": ["a"], "length": 1, "all_classes": None}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr("data/qasper.jsonl", json.dumps(fields) + "\n")
    hub({(repository, archive): buffer.getvalue()})
    assert task.records().rows[0]["answers"] == ["a"]
    hub({(repository, archive): b"no archive"})
    with pytest.raises(BadData, match="cannot be read"):
        task.records()
