"""The suite's command line. `python run_all.py` runs the default suite and writes its report; `--help` lists the rest.

Exit codes: 0 done; 1 some cell failed (the others are stored), or the disk is full; 2 a request that makes no sense (one line
says why); 130 stopped, by Ctrl-C or SIGTERM: what is finished is stored.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness.cli.arguments import parser


def main(arguments: list[str] | None = None) -> int:
    """The exit code of a command. `arguments`: None for those of the process."""
    try:
        _stop_alike()
        _quiet()
        given = sys.argv[1:] if arguments is None else arguments
        options = parser(program()).parse_args(given or ["run"])
        if options.command is None:
            parser(program()).print_help()
            return 2
        options.arguments = given
        code = _guarded(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who read has closed the pipe: `list methods | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only print a traceback of the goodbye
        print("\nstopped; what is finished is stored, and the same command goes on from there", file=sys.stderr)
        return 130


def program() -> str:
    """What the command is called: the script of the checkout, or the installed command."""
    name = Path(sys.argv[0]).name
    return name if name == "kv-cache-scale" else "run_all.py"


def _quiet() -> None:
    """What libraries warn of is no news for users, here and in processes started from here. `python -W default` tells it."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    logging.getLogger().addHandler(logging.NullHandler())  # else records without a handler are printed


def _stop_alike() -> None:
    """SIGTERM stops as Ctrl-C does: batch systems send it before they kill."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    except ValueError:
        return  # not in the main thread: whoever called from there decides


def _guarded(options: argparse.Namespace) -> int:
    from harness.errors import UserError
    from results.store import DiskFull

    try:
        return COMMANDS[options.command](options)
    except DiskFull as error:
        print(f"{program()}: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"{program()}: {error}", file=sys.stderr)
        return 2


def _registry(options: argparse.Namespace) -> Any:
    """What can be named, with the plugins of the command, each tried before it is run."""
    from harness.registry import registry_of

    registry = registry_of(vars(options).get("plugin") or ())
    if vars(options).get("plugin"):
        from harness.evaluation.conformance import check_all

        check_all(registry.plugins)
    return registry


def _run(options: argparse.Namespace) -> int:
    from harness.cli.requests import cost_request, has_cost, run_request
    from harness.suites import COST_SUITES

    if vars(options).get("suite") in COST_SUITES:
        if not has_cost(options):
            print("cost cells are not divided: the first shard measures them, one after the other", file=sys.stderr)
            return 0
        return _cost(cost_request(options), _registry(options), options.arguments)
    request = _with_usual_workers(run_request(options))
    registry = _registry(options)
    from harness.cost.request import cost_behind
    from harness.cost.run import run_cost
    from harness.evaluation import run
    from harness.evaluation.artifacts import record_command

    with run.on_workers(request.cluster):
        failed = _run_rows(options, request, registry)
        failed += run.run_behind(request, registry)
    cost = cost_behind(request)  # nothing else runs by now
    failed += run_cost(cost, registry) if cost else 0
    record_command(request.out, options.arguments)
    _write_reports([request.out])
    if request.judge:  # the report is there, whatever becomes of the judge
        failed += run.judge_request(request, registry)
        _write_reports([request.out])
    return 1 if failed else 0


def _with_usual_workers(request: Any) -> Any:
    """The request on a process a core, where its suite is made for that and nothing else was asked for."""
    from harness.cluster.crews import usual_workers
    from harness.evaluation.request import Shard
    from harness.suites import SUITES

    suite = SUITES.get(request.suite)
    if suite is None or suite.worker_bytes is None or request.cluster or request.models or request.shard != Shard():
        return request
    return replace(request, cluster=usual_workers(suite.worker_bytes, request.device))


def _run_rows(options: argparse.Namespace, request: Any, registry: Any) -> int:
    """How many cells failed."""
    if "precision" in vars(options):
        from harness.cli.precision import run_until_narrow

        return run_until_narrow(request, registry, options.precision).failed
    from harness.evaluation.run import run_request

    return run_request(request, registry).failed


def _cost(request: Any, registry: Any, arguments: list[str]) -> int:
    from harness.cost.run import run_cost
    from harness.evaluation.artifacts import record_command

    failed = run_cost(request, registry)
    record_command(request.out, arguments)
    _write_reports([request.out])
    return 1 if failed else 0


def _plan(options: argparse.Namespace) -> int:
    from harness.cli.requests import cost_request, run_request
    from harness.suites import COST_SUITES

    as_json = "json" in vars(options)
    if vars(options).get("suite") in COST_SUITES:
        from harness.cost.request import plan_cost

        cost = asdict(plan_cost(cost_request(options), _registry(options)))
        print(json.dumps(cost, indent=1) if as_json else _cost_line(cost))
        return 0
    request, registry = run_request(options), _registry(options)
    from harness.evaluation.run import plans_of

    plans = [asdict(plan) for plan in plans_of(request, registry)]
    print(json.dumps(plans, indent=1) if as_json else "\n".join(map(_plan_line, plans)))
    return 0


def _plan_line(plan: dict[str, Any]) -> str:
    head = f"{plan['model']}: {plan['cells']} cells to run on {plan['prefills']} prompts, {plan['finished']} finished"
    return "\n".join([head, *(f"  skipped: {reason} ({count} cells)" for reason, count in plan["skipped"].items())])


def _cost_line(plan: dict[str, Any]) -> str:
    counts = f"{plan['memory']} of memory, {plan['latency']} of latency"
    return f"{plan['suite']}: {plan['cells']} cells to run ({counts}), each in a process of its own, {plan['finished']} finished"


def _list(options: argparse.Namespace) -> int:
    from harness.cli.listing import listing, methods_by_sight
    from harness.registry import registry_of

    registry = registry_of(vars(options).get("plugin") or ())
    if options.what == "methods" and "json" not in vars(options):
        for sight, methods in methods_by_sight(registry).items():
            print(f"{sight}:")
            _print_table({f"  {name}": about for name, about in methods.items()}, as_json=False)
        return 0
    found = listing(options.what, registry, vars(options).get("data_dir"))
    _print_table(found, "json" in vars(options))
    return 0


def _print_table(found: dict[str, Any], as_json: bool) -> None:
    wide = max(len(name) for name in found)
    print(json.dumps(found, indent=1) if as_json else "\n".join(f"{name:{wide}}  {about}" for name, about in found.items()))


def _report(options: argparse.Namespace) -> int:
    from harness.cli.requests import picture_formats, report_folders

    _write_reports(report_folders(options), picture_formats(options))
    return 0


def _write_reports(folders: list[Path], formats: tuple[str, ...] = ()) -> None:
    """The report of each folder, and of several the others beside the first."""
    from reports.compare import write_comparison
    from reports.write import write_report

    for folder in folders:
        for path in write_report(folder, formats):
            print(path)
    if len(folders) > 1:
        for path in write_comparison(folders[0], folders[1:]):
            print(path)


def _publish(options: argparse.Namespace) -> int:
    from harness.cli.requests import report_folders
    from reports.publish import publish

    for path in publish(report_folders(options), options.to):
        print(path)
    return 0


def _train(options: argparse.Namespace) -> int:
    from harness.cli.requests import train_request
    from harness.training.request import train
    from reports.training import loss_picture

    registry = _registry(options)
    done = train(train_request(options, registry), registry)
    if done is None:  # not the first of several processes
        return 0
    about = done.about
    loss_picture(about.results["losses"], about.name, done.folder / "loss.png")
    share = f"{about.results['kv_share']:.1%} of the parent's cache"
    print(f"{about.name}: {about.results['tokens']} tokens in {about.results['seconds']:.0f} s; {share}")
    if "agreement" in about.results:
        shares = ", ".join(f"{share:.1%}" for share in about.results["decode_shares"])
        print(f"argmax agrees with expert choice on {about.results['agreement']:.1%} of held-out tokens; its shares: {shares}")
    print(done.folder)
    return 0


def _importance(options: argparse.Namespace) -> int:
    from harness.cli.requests import importance_request
    from harness.papers.estimate import estimate_importance
    from reports.heads import head_map

    request = importance_request(options)
    scores = estimate_importance(request, _registry(options))
    forced = ", teacher-forced (ours)" if scores.settings["teacher_forced"] else ""
    shares = scores.values / scores.values.sum()
    title = f"{scores.variant}, {scores.kind}{forced}"
    picture = request.path.with_suffix(".png")
    head_map(shares, title, picture)
    print(f"{title}: {scores.successes} of {scores.attempts} attempts succeeded, {1 / (shares**2).sum():.1f} effective heads")
    print(request.path)
    print(picture)
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from harness.cli.requests import calibration_request
    from harness.papers.calibrate import calibrate

    request = calibration_request(options)
    found = calibrate(request, _registry(options))
    print(f"{found.variant}: statistics of queries over {found.tokens:,} tokens")
    print(request.path)
    return 0


def _beta(options: argparse.Namespace) -> int:
    from harness.cli.requests import betas_of, run_request
    from harness.papers.beta import BETAS, choose_beta

    found = choose_beta(run_request(options), _registry(options), betas_of(options) or BETAS)
    for choice in found.choices:
        tried = ", ".join(f"{beta}: {mean:.3g}" for beta, mean in choice.means.items())
        what = f"{choice.model}, {choice.prompt}, {choice.method} at {choice.budget}"
        print(f"{what}: beta {choice.beta:g}, of {choice.examples} examples ({tried})")
    print(found.path)
    return 0


def _tokens(options: argparse.Namespace) -> int:
    from harness.cli.requests import tokens_request

    return _token_importance(tokens_request(options), _registry(options))


def _token_importance(request: Any, registry: Any) -> int:
    from harness.papers.token_importance import token_importance
    from reports.tokens import token_picture

    found = token_importance(request, registry)
    for path in token_picture(found.words, found.changes, found.plain, found.model, request.out):
        print(path)
    return 0


def _score(options: argparse.Namespace) -> int:
    from benchmarks.data import BadData
    from benchmarks.longbench import score_files

    given = vars(options)
    paths = [options.path]
    if options.path.is_dir():
        paths = sorted(path for path in options.path.iterdir() if ".jsonl" in path.suffixes)
    if not paths:
        raise BadData(f"{options.path} holds no *.jsonl, *.jsonl.gz or *.jsonl.xz")
    _print_table(score_files(paths, "extended" in given, given.get("workers", os.cpu_count() or 1)), "json" in given)
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from harness.cli.requests import reproduce_request
    from harness.cli.side_by_side import write
    from harness.evaluation.artifacts import record_command
    from harness.papers.reproduce import reproduce, tokens_behind

    request, registry = reproduce_request(options), _registry(options)
    if tokens := tokens_behind(request):
        return _token_importance(tokens, registry)
    done = reproduce(request, registry)
    record_command(request.out, options.arguments)
    for path in write(done, request.out):
        print(path)
    return 1 if done.failed else 0


def _bench(options: argparse.Namespace) -> int:
    from harness.cost.evict_bench import evict_speed
    from harness.cost.microbench import attention_speed, checked_kernel_speed, linear_speed, sweep_speed
    from harness.models.load import device_of, dtype_of
    from methods import METHODS

    given = vars(options)
    if options.what == "cluster":
        return _simulated(given)
    if options.what == "methods":
        from harness.cost.method_costs import method_costs

        line = method_costs(METHODS)
    elif options.what == "sweep":
        line = sweep_speed(METHODS, "verify" in given)
    elif options.what == "attention":
        line = attention_speed()
    elif options.what == "linear":
        line = linear_speed()
    elif options.what == "storages":
        from harness.cost.storage_bench import storage_speed, storage_sweep
        from harness.registry import BUILTIN

        line = storage_speed(BUILTIN.storages) | storage_sweep(BUILTIN)
    elif options.what == "evict":
        line = evict_speed(METHODS)
    elif options.what == "variants":
        from harness.cost.variant_bench import variant_speed
        from harness.registry import BUILTIN

        line = variant_speed(BUILTIN)
    else:
        device = device_of(given.get("device"))
        line = checked_kernel_speed(device, dtype_of(given.get("dtype", "bfloat16"), device))
    print(json.dumps(line))
    return 0


def _simulated(given: dict[str, Any]) -> int:
    """A line for each number of workers."""
    from harness.cli.requests import simulation
    from harness.cluster.simulate import simulate

    times, workers, units = simulation(given)
    for count in sorted({1, 8, 64, workers}):
        print(json.dumps(simulate(times, count, units or 20 * workers)))
    return 0


def _new(options: argparse.Namespace) -> int:
    from harness.cli.new_plugin import start_plugin
    from harness.registry import registry_of

    path = start_plugin(options.kind, options.name, registry_of())
    print(
        f"{path}: runs as it is; change it, then\n  python run_all.py check {path}\n  python run_all.py run --plugin {path} ..."
    )
    return 0


def _check(options: argparse.Namespace) -> int:
    from harness.evaluation.conformance import check_plugin
    from harness.registry import registry_of

    broken = 0
    for finding in check_plugin(registry_of([options.plugin]).plugins[-1]):
        broken += finding.wrong is not None
        print(f"{finding.entry}: {finding.check}: {'ok' if finding.wrong is None else f'NO: {finding.wrong}'}")
    return 1 if broken else 0


COMMANDS = {
    "run": _run,
    "plan": _plan,
    "list": _list,
    "report": _report,
    "publish": _publish,
    "train": _train,
    "importance": _importance,
    "calibrate": _calibrate,
    "beta": _beta,
    "token-importance": _tokens,
    "score": _score,
    "reproduce": _reproduce,
    "bench": _bench,
    "new": _new,
    "check": _check,
}
