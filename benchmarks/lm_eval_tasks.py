"""Any task of lm-eval under a compressed cache: its requests as examples, its own filters, metrics and aggregation.

Gao et al., "The Language Model Evaluation Harness", 2024. zenodo.org/records/12608602
A task's requests are collected once. Multiple-choice and likelihood requests become branches behind a compressed context,
generation requests become prompts. An answer is scored by the task's own code, and `aggregate` replays a cell into lm-eval.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from benchmarks import data
from benchmarks.base import CountTokens, Example, Metric, Request
from benchmarks.data import BadData, Data

LIKELIHOODS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
MATTERS = ("output_type", "metric_list", "filter_list", "generation_kwargs", "num_fewshot", "repeats", "metadata")  # of a config
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of the same setting
FEWSHOT_SEED = 1234  # as lm-eval sets it
NEW_TOKENS = 256  # of an answer, where a task does not say


@dataclass(frozen=True, repr=False)
class LmEval:
    """One task: a name of `lm-eval --tasks list`, or a task file of the user's own (.yaml)."""

    task: str = "piqa"
    fewshot: int = -1  # worked examples before the question; -1: as many as the task says
    data_dir: Path | None = field(default=None, compare=False)  # with <task>.jsonl, by itself or in lm_eval/
    forced = False

    @property
    def likelihoods(self) -> bool:
        """Are likelihoods asked for? Then nothing is generated, and no setting of generation matters."""
        return self.opened.task.OUTPUT_TYPE in LIKELIHOODS

    @property
    def chat(self) -> bool:
        """A text that is scored as a whole is put into no template."""
        return self.opened.task.OUTPUT_TYPE != "loglikelihood_rolling"

    def __repr__(self) -> str:
        return f"LmEval(task={Path(self.task).stem!r}, fewshot={self.fewshot})"

    @property
    def name(self) -> str:
        return "lm_eval@1"

    @property
    def opened(self) -> Opened:
        return _open(self.task, self.fewshot, self.data_dir)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        better = self.opened.task.higher_is_better()
        return tuple(Metric(name, unit="share", higher_is_better=bool(up)) for name, up in better.items())

    def records(self) -> Data:
        return self.opened.data

    @property
    def size(self) -> int:
        return len(self.opened.requests)

    @property
    def data(self) -> str:
        return self.opened.data.sha256

    def example(self, index: int, seed: int, count_tokens: CountTokens) -> Example:
        asked = self.opened.requests[index]
        kind = asked[0].request_type
        if kind == "generate_until":
            context, settings = asked[0].args
            until = settings.get("until") or ()
            ends = (until,) if isinstance(until, str) else tuple(until)
            most = int(next((settings[name] for name in LENGTHS if settings.get(name)), NEW_TOKENS))
            return Example(index, context, len(context), (), most, until=tuple(end for end in ends if end), cut="start")
        if kind == "loglikelihood_rolling":
            return Example(index, "", 0, (), 0, requests=tuple(Request("", one.args[0], rolling=True) for one in asked))
        return Example(index, "", 0, (), 0, requests=tuple(Request(*one.args) for one in asked))

    def score(self, answer: str, example: Example) -> dict[str, float]:
        """What the task's own code makes of this example; metrics that only exist over all of them are left to `aggregate`."""
        task, asked = self.opened.task, self.opened.requests[example.index]
        pairs = zip(asked, _responses(asked, answer), strict=True)
        done = [replace(one, resps=[response] * (one.repeats or 1), filtered_resps={}) for one, response in pairs]
        found: dict[str, float] = {}
        means = {name: getattr(how, "__name__", "") == "mean" for name, how in task.aggregation().items()}
        for ensemble in task._filters:
            ensemble.apply(done)
            filtered = [one.filtered_resps[ensemble.name] for one in done]
            for name, value in task.process_results(done[0].doc, filtered).items():
                if isinstance(value, int | float) and means.get(name):
                    found[name if ensemble.name == "none" else f"{name},{ensemble.name}"] = float(value)
        return found


@dataclass(frozen=True)
class Opened:
    """A task of lm-eval, and its requests by example."""

    task: Any
    requests: tuple[tuple[Any, ...], ...]
    data: Data


def aggregate(task: LmEval, answers: Mapping[int, str]) -> dict[str, float]:
    """lm-eval's own results for stored answers, by example: as if a model had given them just now."""
    from lm_eval import evaluator

    opened, wanted = task.opened, sorted(answers)
    name = opened.task.config.task
    tasks = {"tasks": {name: opened.task}, "groups": {}, "group_map": {}}
    with _quiet():
        found = evaluator.evaluate(_replay(opened, answers, wanted), tasks, samples={name: wanted}, bootstrap_iters=0)
    results = found["results"][name]
    return {metric: float(value) for metric, value in results.items() if isinstance(value, int | float) and "," in metric}


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval draws a bar and warns of every setting that a task leaves open."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _replay(opened: Opened, answers: Mapping[int, str], wanted: list[int]) -> Any:
    """A model in lm-eval's sense, which says what was said before."""
    from lm_eval.api.model import LM

    class Replay(LM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            known = {n: _responses(opened.requests[n], answers[n]) for n in wanted}
            return [known[wanted[one.doc_id]][one.idx] for one in requests]  # lm-eval numbers the chosen examples anew

        generate_until = loglikelihood_rolling = loglikelihood

    return Replay()


def _responses(asked: tuple[Any, ...], answer: str) -> list[Any]:
    """A stored answer as lm-eval's requests expect it."""
    kind = asked[0].request_type
    if kind == "generate_until":
        return [answer]
    found = data.likelihoods(answer)
    return [logprob if kind == "loglikelihood_rolling" else (logprob, greedy) for logprob, greedy, _ in found]


@lru_cache(maxsize=16)
def _open(name: str, fewshot: int, data_dir: Path | None) -> Opened:
    """
    Raises:
        BadData: lm-eval or the task is not there, its data cannot be had or read, or it asks for what the harness cannot give.
    """
    base = _file(name)
    local = _local(Path(name).stem, data_dir)
    task = _load(name, base, local, fewshot)
    if task.OUTPUT_TYPE not in (*LIKELIHOODS, "generate_until"):
        raise BadData(
            f"lm_eval:{name} has output type {task.OUTPUT_TYPE!r}; {', '.join(LIKELIHOODS)} and generate_until are known"
        )
    _check(task, f"lm_eval:{name}" if local is None else str(local))
    task.set_fewshot_seed(FEWSHOT_SEED)  # else the worked examples are other ones each time
    with _quiet():
        task.build_all_requests(limit=None, rank=0, world_size=1)
    requests: dict[int, list[Any]] = {}
    for one in task.instances:
        requests.setdefault(int(one.doc_id), []).append(one)
    grouped = tuple(tuple(sorted(found, key=lambda one: one.idx)) for _, found in sorted(requests.items()))
    settings = {name: str(value) for name, value in task.dump_config().items() if name in MATTERS}
    docs = [[asked[0].doc, *([one.request_type, *map(str, one.args)] for one in asked)] for asked in grouped]
    content = json.dumps([settings, docs], default=str, sort_keys=True)
    source = local.name if local else f"{task.config.dataset_path} ({task.config.dataset_name or 'default'})"
    rows = tuple(dict(asked[0].doc) for asked in grouped)
    return Opened(
        task, grouped, Data(rows, hashlib.sha256(content.encode()).hexdigest(), source, "see the task's README in lm-eval")
    )


def _file(name: str) -> Path:
    """The task's file: the user's, or the one of the installed lm-eval."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise BadData(f"lm_eval:{name}: no such file")
        return Path(name).resolve()
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise BadData(f"lm_eval:{name} needs lm-eval, which is not installed: pip install lm-eval")
    folder = Path(found.origin).parent / "tasks"
    says = re.compile(rf"^[\"']?task[\"']?:\s*[\"']?{re.escape(name)}[\"']?\s*$", re.MULTILINE)
    named = [path for path in folder.rglob(f"{name}.y*ml") if says.search(path.read_text(encoding="utf-8", errors="replace"))]
    every = named or (path for path in sorted(folder.rglob("*.yaml")) if says.search(path.read_text(errors="replace")))
    path = next(iter(every), None)
    if path is None:
        raise BadData(
            f"the installed lm-eval has no task {name!r} (groups are not tasks: name theirs); lm-eval ls tasks lists them"
        )
    return path


def _local(stem: str, data_dir: Path | None) -> Path | None:
    """The user's rows, checked: every line has the fields of the first."""
    folders = () if data_dir is None else (data_dir / "lm_eval", data_dir)
    path = next((found for folder in folders if (found := folder / f"{stem}.jsonl").is_file()), None)
    if path is None:
        return None
    first: set[str] = set()
    for number, row in data.lines(data.read(path), path):
        first = first or set(row)
        if missing := sorted(first - set(row)):
            raise BadData(f"{path}, line {number}: no field {missing[0]!r}, which the first line has")
    if not first:
        raise BadData(f"{path} holds no record")
    return path.resolve()


def _load(name: str, base: Path, local: Path | None, fewshot: int) -> Any:
    """The task object: lm-eval's file, with the user's rows in the place of its data."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise BadData(f"lm_eval:{name} needs lm-eval, which cannot be loaded: {error}") from None
    settings: dict[str, Any] = {"include": str(base)}
    if local is not None:
        # one split for all: lm-eval then never shows the example that is asked among the worked ones
        settings |= {"dataset_path": "json", "dataset_name": None, "custom_dataset": None, "training_split": None}
        settings |= {"validation_split": None, "test_split": "test", "fewshot_split": "test"}
        settings |= {"dataset_kwargs": {"data_files": {"test": str(local)}}}
    if fewshot >= 0:
        settings["num_fewshot"] = fewshot
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{Path(name).stem}.yaml"
        path.write_text(yaml.safe_dump(settings))
        try:
            with _quiet():
                (task,) = TaskManager(include_defaults=False).load([str(path)])["tasks"].values()
        except Exception as error:  # lm-eval and datasets raise whatever their parts do: all of it means the same here
            where = f"{local}" if local else f"no lm_eval/{Path(name).stem}.jsonl in --data-dir, and its data cannot be loaded"
            raise BadData(f"lm_eval:{name}: {where}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None
    return task


def _check(task: Any, where: str) -> None:
    """Every row must have what the task makes prompts and right answers of."""
    for number, doc in enumerate(task.eval_docs, 1):
        try:
            text, target = task.doc_to_text(doc), task.doc_to_target(doc)
            choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else []
        except Exception as error:  # templates and functions of the task's own
            reason = (str(error).splitlines() or [""])[0][:160]
            raise BadData(f"{where}, record {number}: {type(error).__name__}: {reason}") from None
        right = text if isinstance(text, int) else target  # where contexts differ, the text is the number
        for one in (right if isinstance(right, list) else [right]) if choices else []:
            if one not in (range(len(choices)) if isinstance(one, int) else choices):
                raise BadData(f"{where}, record {number}: right answer {one!r} is none of its {len(choices)} choices")
