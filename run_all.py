#!/usr/bin/env python3
"""The suite's command line. `python run_all.py` runs the default suite and writes its report; `--help` lists the rest.

Exit codes: 0 done, 2 a request that makes no sense (one line says why), 1 some cell failed (the others are stored).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness.cli.arguments import OUT, parser
from results.store import StoreError


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments or ["run"])
    options.arguments = arguments
    if options.command is None:
        parser().print_help()
        return 2
    try:
        return _with_plugins(options)
    except StoreError as error:
        return _refuse(error)
    except ValueError as error:
        from harness.evaluation.request import REFUSED

        if isinstance(error, REFUSED):
            return _refuse(error)
        raise
    except KeyboardInterrupt:
        print("\nstopped; what is finished is stored, and the same command goes on from there", file=sys.stderr)
        return 130


def _with_plugins(options: argparse.Namespace) -> int:
    """Runs the command; what a plugin brings is tried before it is run."""
    if not getattr(options, "plugin", None):
        return COMMANDS[options.command](options)
    from harness.evaluation.conformance import first_fault
    from harness.plugins import BadPlugin, plugged

    with plugged(options.plugin) as plugins:
        for plugin in plugins if options.command != "check" else ():
            if fault := first_fault(plugin):
                raise BadPlugin(f"plugin {plugin.path}: {fault} (run `run_all.py check {plugin.path}` for all of it)")
        options.plugins = plugins
        return COMMANDS[options.command](options)


def _refuse(error: Exception) -> int:
    print(f"run_all.py: {error}", file=sys.stderr)
    return 2


def _run(options: argparse.Namespace) -> int:
    if options.suite in ("sweep-speed", "attention-speed"):
        from harness.cost.microbench import attention_speed, sweep_speed
        from methods import METHODS

        line = sweep_speed(METHODS, options.verify) if options.suite == "sweep-speed" else attention_speed()
        print(json.dumps(line))
        return 0
    if options.suite == "kernel-speed":
        return _kernel_speed(options)
    from harness.cost.request import cost_behind
    from harness.evaluation.artifacts import record_command
    from harness.evaluation.request import judge_request, run_request
    from harness.suites import COST_SUITES

    if options.suite in COST_SUITES:
        return _cost(options)
    failed = run_request(options)
    failed += cost_behind(options)
    record_command(options.out, options.arguments)
    done = _report(options)
    if options.judge_url:  # the report is there, whatever becomes of the judge
        failed += judge_request(options).statuses["unreachable"]
        done = _report(options)
    return max(done, 1 if failed else 0)


def _kernel_speed(options: argparse.Namespace) -> int:
    import torch

    from harness.cost.kernel_speed import DIM, kernel_speed
    from harness.engine.kernels import unsupported
    from harness.engine.measure import OutOfMemory, memory_errors
    from harness.evaluation.plan import BadRequest
    from harness.evaluation.request import device_of

    device = device_of(options.device)
    dtype = getattr(torch, options.dtype or "bfloat16")
    if device.type != "cuda":
        raise BadRequest("the suite kernel-speed measures a GPU, and there is none here")
    if reason := unsupported(dtype, DIM):
        raise BadRequest(f"the suite kernel-speed has nothing to measure: {reason}")
    try:
        with memory_errors():
            line = kernel_speed(device, dtype)
    except OutOfMemory as error:
        raise BadRequest(f"the suite kernel-speed needs about 4 GB of the GPU's memory: {error}") from None
    print(json.dumps(line))
    return 0


def _cost(options: argparse.Namespace) -> int:
    from harness.cost.request import cost_request
    from harness.evaluation.artifacts import record_command

    failed = cost_request(options)
    record_command(options.out, options.arguments)
    return max(_report(options), 1 if failed else 0)


def _plan(options: argparse.Namespace) -> int:
    from harness.cost.request import cost_plan
    from harness.evaluation.request import plan_request
    from harness.suites import COST_SUITES

    if options.suite in COST_SUITES:
        plan = cost_plan(options)
        print(json.dumps(plan, indent=1) if options.json else _cost_line(plan))
        return 0
    plans = plan_request(options)
    print(json.dumps(plans, indent=1) if options.json else "\n".join(_plan_line(plan) for plan in plans))
    return 0


def _plan_line(plan: dict[str, Any]) -> str:
    head = f"{plan['model']}: {plan['cells']} cells to run on {plan['prefills']} prompts, {plan['finished']} finished"
    return "\n".join([head, *(f"  skipped: {reason} ({count} cells)" for reason, count in plan["skipped"].items())])


def _cost_line(plan: dict[str, Any]) -> str:
    counts = f"{plan['memory']} of memory, {plan['latency']} of latency"
    return f"{plan['suite']}: {plan['cells']} cells to run ({counts}), each in a process of its own, {plan['finished']} finished"


def _list(options: argparse.Namespace) -> int:
    from harness.cli.listing import listing

    found = listing(options.what, options.data_dir)
    wide = max(len(name) for name in found)
    print(json.dumps(found, indent=1) if options.json else "\n".join(f"{name:{wide}}  {about}" for name, about in found.items()))
    return 0


def _report(options: argparse.Namespace) -> int:
    from reports.compare import write_comparison
    from reports.write import write_report

    folders = options.out if isinstance(options.out, list) else [options.out or OUT]
    if len(folders) > 2:
        return _refuse(ValueError(f"--out is given {len(folders)} times: one run, or two side by side"))
    for folder in folders:
        for path in write_report(folder):
            print(path)
    if len(folders) == 2:
        for path in write_comparison(*folders):
            print(path)
    return 0


def _importance(options: argparse.Namespace) -> int:
    from harness.evaluation.request import importance_request
    from reports.heads import head_map

    scores, out = importance_request(options)
    forced = ", teacher-forced (ours)" if scores.settings["teacher_forced"] else ""
    shares = scores.values / scores.values.sum()
    title = f"{scores.variant}, {scores.kind}{forced}"
    head_map(shares, title, out.with_suffix(".png"))
    print(f"{title}: {scores.successes} of {scores.attempts} attempts succeeded, {1 / (shares**2).sum():.1f} effective heads")
    print(out)
    print(out.with_suffix(".png"))
    return 0


def _train(options: argparse.Namespace) -> int:
    from harness.training.request import train_request
    from reports.training import loss_picture

    done = train_request(options)
    if done is None:  # not the first of several processes
        return 0
    about, out = done
    loss_picture(about.results["losses"], about.name, out / "loss.png")
    share = f"{about.results['kv_share']:.1%} of the parent's cache"
    print(f"{about.name}: {about.results['tokens']} tokens in {about.results['seconds']:.0f} s; {share}")
    if "agreement" in about.results:
        shares = ", ".join(f"{share:.1%}" for share in about.results["decode_shares"])
        print(f"argmax agrees with expert choice on {about.results['agreement']:.1%} of held-out tokens; its shares: {shares}")
    print(out)
    return 0


def _tokens(options: argparse.Namespace) -> int:
    from harness.evaluation.request import tokens_request
    from reports.tokens import token_picture

    name, words, changes, plain = tokens_request(options)
    for path in token_picture(words, changes, plain, name, options.out):
        print(path)
    return 0


def _score(options: argparse.Namespace) -> int:
    from benchmarks.data import BadData
    from benchmarks.longbench import score_files

    paths = [options.path]
    if options.path.is_dir():
        paths = sorted(path for path in options.path.iterdir() if ".jsonl" in path.suffixes)
    try:
        if not paths:
            raise BadData(f"{options.path} holds no *.jsonl, *.jsonl.gz or *.jsonl.xz")
        found = score_files(paths, options.extended, options.workers)
    except BadData as error:
        return _refuse(error)
    wide = max(len(task) for task in found)
    text = "\n".join(f"{task:{wide}}  {value}" for task, value in found.items())
    print(json.dumps(found, indent=1) if options.json else text)
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from harness.evaluation.artifacts import record_command
    from harness.papers.reproduce import reproduce_request
    from harness.papers.tables import HUB, table_of
    from reports.paper import write_side_by_side
    from reports.paper_points import Drawing, PaperRow, Setting, Side

    table = table_of(options.table)
    if table.kind == "tokens":
        text = (options.data_dir or Path()) / "lm" / "wikitext2" / "wiki.test.raw"
        asked = ["token-importance", "--model", options.model or HUB["Llama3.1-8B"], "--text", str(text)]
        return _tokens(parser().parse_args([*asked, "--out", str(options.out / "report" / "paper_mixsga_figure1")]))
    done = reproduce_request(options, lambda arguments: parser().parse_args(arguments))
    record_command(options.out, options.arguments)
    rows = [
        PaperRow(
            method=str(row["method"]),
            setting=Setting.of(row),
            values=row["values"],
            benchmarks={column: table.benchmarks(row, column, done.facts) for column in row["values"]},
            measured_with=one.method,
            command="" if one.model else one.command,
            numbers=done.numbers[place] if done.numbers else None,
        )
        for place, (row, one) in enumerate(zip(done.rows, done.asked, strict=True))
    ]
    title = f"{table.name}, {done.paper_model} in the paper, {done.model} here"
    drawing = Drawing(**table.numbers["drawing"]) if "drawing" in table.numbers else None
    side = Side(table.name, title, done.settings, table.numbers["averages"], table.scale, table.exponent, drawing)
    for path in write_side_by_side(options.out, side, rows, [(one.model, one.budget) for one in done.asked], done.keys):
        print(path)
    return 1 if done.failed else 0


def _new(options: argparse.Namespace) -> int:
    from harness.plugins import NAME

    path = Path(f"{options.name}.py")
    if not NAME.fullmatch(options.name):
        return _refuse(ValueError(f"{options.name!r} is no name of letters, digits and underscores"))
    if path.exists():
        return _refuse(ValueError(f"{path} is there already"))
    example = Path(__file__).parent / "docs" / "plugins" / f"{options.kind}.py"
    theirs = EXAMPLES[options.kind]
    path.write_text(example.read_text(encoding="utf-8").replace(theirs, options.name), encoding="utf-8")
    print(
        f"{path}: runs as it is; change it, then\n  python run_all.py check {path}\n  python run_all.py run --plugin {path} ..."
    )
    return 0


EXAMPLES = {"method": "large_values", "allocator": "middle_layers", "benchmark": "capitals", "conversion": "keep_first"}


def _check(options: argparse.Namespace) -> int:
    from harness.evaluation.conformance import check_plugin

    broken = 0
    for finding in check_plugin(options.plugins[0]):
        broken += finding.wrong is not None
        print(f"{finding.entry}: {finding.check}: {'ok' if finding.wrong is None else f'NO: {finding.wrong}'}")
    return 1 if broken else 0


def _beta(options: argparse.Namespace) -> int:
    from harness.papers.beta import beta_request

    choices, path = beta_request(options)
    for choice in choices:
        tried = ", ".join(f"{beta}: {mean:.3g}" for beta, mean in choice.means.items())
        what = f"{choice.model}, {choice.prompt}, {choice.method} at {choice.budget}"
        print(f"{what}: beta {choice.beta:g}, of {choice.examples} examples ({tried})")
    print(path)
    return 0


COMMANDS = {
    "run": _run,
    "plan": _plan,
    "list": _list,
    "report": _report,
    "train": _train,
    "token-importance": _tokens,
    "importance": _importance,
    "beta": _beta,
    "score": _score,
    "reproduce": _reproduce,
    "new": _new,
    "check": _check,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
