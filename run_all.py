#!/usr/bin/env python3
"""The suite's command line. `python run_all.py` runs the default suite and writes its report; `--help` lists the rest.

Exit codes: 0 done, 2 a request that makes no sense (one line says why), 1 some cell failed (the others are stored).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from results.store import StoreError

OUT = Path("results/default")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="run_all.py", description=__doc__.splitlines()[0])
    commands = main.add_subparsers(dest="command", metavar="command")
    for name, about in (("run", "run a suite and write its report"), ("plan", "what `run` would do; runs nothing")):
        _add_request(commands.add_parser(name, help=about, description=about))
    listing = commands.add_parser("list", help="what there is", description="what there is")
    listing.add_argument("what", choices=("methods", "conversions", "recipes", "benchmarks", "suites", "models", "papers"))
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.add_argument("--data-dir", type=Path, help="papers: where their data are looked for")
    _add_plugin(listing)
    about = "estimate head scores for HeadKV, and draw them"
    _add_importance(commands.add_parser("importance", help=about, description=about))
    about = "convert a model to GQA, MQA or mixSGA, heal it, save it as a variant"
    _add_train(commands.add_parser("train", help=about, description=about))
    about = "average one token's keys and values over all heads: what becomes of the perplexity (mixSGA's figure 1)"
    tokens = commands.add_parser("token-importance", help=about, description=about)
    _add_model(tokens)
    tokens.add_argument("--text", type=Path, required=True, help="file; its first tokens are read as one sequence")
    tokens.add_argument("--tokens", type=int, default=128, help="(default: %(default)s)")
    tokens.add_argument(
        "--out", type=Path, default=Path("results/token_importance"), help="of .csv and .png (default: %(default)s)"
    )
    about = "choose HeadKV's beta on held-out examples, for `run --examples test`"
    beta = commands.add_parser("beta", help=about, description=about)
    _add_request(beta)
    beta.add_argument("--betas", help="with commas (default: the paper's grid)")
    about = "official scores of predictions made elsewhere"
    score = commands.add_parser("score", help=about, description=about)
    score.add_argument("benchmark", choices=("longbench",))
    score.add_argument("path", type=Path, help="<task>.jsonl (.gz, .xz) of LongBench's own form, or a folder of them")
    score.add_argument("--extended", action="store_true", help="LongBench-E: by length")
    score.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    score.add_argument("--json", action="store_true", help="as JSON")
    about = "a paper's table: its numbers beside those measured here"
    again = commands.add_parser("reproduce", help=about, description=about)
    again.add_argument("table", help="such as headkv:table2; `list papers` names them, with what each needs")
    again.add_argument("--model", help="reference, a folder or a hub id (default: the paper's)")
    again.add_argument("--paper-model", help="which of the paper's models, a part of its name (default: the first)")
    again.add_argument("--fair", action="store_true", help="a row a KV head and chat templates: equal bytes")
    again.add_argument("--limit", type=int, default=200, help="examples of each task (default: %(default)s)")
    again.add_argument("--train", action="store_true", help="train the variants that are missing, by the paper's recipe")
    again.add_argument("--steps", type=int, help="of that training, instead of the recipe's epochs")
    again.add_argument("--epochs", type=float, help="of that training, instead of the recipe's")
    again.add_argument("--instruct", type=Path, help="of that training: a .jsonl with prompt and output instead of Dolly-15k")
    about = "folder where trained variants are looked for and put (default: %(default)s)"
    again.add_argument("--variants", type=Path, default=Path("results/variants"), help=about)
    again.add_argument("--context", type=int, help="tokens of the prompt, for tables of time (default: the paper's)")
    again.add_argument(
        "--data-dir", type=Path, help="folder with data sets and published head scores; looked into before the hub"
    )
    again.add_argument("--head-scores", help="files or folders of head scores for HeadKV, with commas")
    again.add_argument("--device", default=None, help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    again.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    again.add_argument("--out", type=Path, default=Path("results/papers"), help="(default: %(default)s)")
    about = "start a plugin of your own from an example that runs at once"
    new = commands.add_parser("new", help=about, description=about)
    new.add_argument("kind", choices=("method", "allocator", "benchmark", "conversion"))
    new.add_argument("name", help="of what it brings; the file is NAME.py")
    about = "try what a plugin brings against what every method, benchmark and conversion must hold"
    check = commands.add_parser("check", help=about, description=about)
    check.add_argument("plugin", nargs=1, help="the file")
    report = commands.add_parser("report", help="tables and plots from stored rows", description="no model is needed")
    about = f"folder of the rows (default: {OUT}); given twice, the two are also put side by side"
    report.add_argument("--out", type=Path, action="append", help=about)
    return main


def _add_plugin(command: argparse.ArgumentParser) -> None:
    about = "a file of your own with methods, benchmarks or conversions (see `new`); may be given several times"
    command.add_argument("--plugin", action="append", metavar="FILE.py", help=about)


def _add_request(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_plugin(command)
    add("--suite", default="default", help="a suite of `list suites`; the options below narrow or change it")
    add("--model", help="reference, random:<shape>, a folder or a hub id; several with commas")
    add("--revision", help="of a hub id")
    add("--methods", help="such as snapkv,h2o or snapkv(kernel=5)")
    add("--budgets", help="KV sizes (128) or shares of the full cache (25%%), with commas")
    add("--benchmarks", help="such as random_tokens(length=1024), with commas")
    add("--prompt", help="question_in, question_after, or both with a comma")
    add("--chat", choices=("raw", "template"), default="raw", help="(default: %(default)s)")
    add("--granularity", choices=("kv", "query"), default="kv", help="rows a KV head or a query head (default: %(default)s)")
    add("--routing", default="expert_choice", help="of a mixSGA prefill: expert_choice, argmax, or both (default: %(default)s)")
    add("--truncation", type=int, help="tokens of a prompt; longer ones keep their two ends (default: the model's positions)")
    add("--max-new-tokens", type=int, help="of an answer (default: the benchmark's)")
    add("--limit", type=int, help="examples of each benchmark")
    add("--seed", help="of generated examples and sampled answers; several with commas")
    add("--temperature", type=float, help="of sampled answers (default: the suite's; 0 is greedy)")
    add("--out", type=Path, default=OUT, help="folder for rows and report (default: %(default)s)")
    add("--device", default=None, help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: float32 on a CPU, bfloat16 on a GPU)")
    add("--cell-bytes", type=int, help="rows of the cells decoded together, at most this many bytes")
    add("--contexts", help="cost suites: tokens of the prompts, with commas")
    add("--batches", help="cost suites: sequences decoded together, with commas")
    add("--rounds", type=int, help="cost suites: how often each latency is measured")
    add("--shard", default="1/1", help="i/n: the i-th of n shares of the examples (default: %(default)s)")
    add("--data-dir", type=Path, help="folder with data sets and published head scores; looked into before the hub")
    add("--head-scores", help="files or folders of head scores for HeadKV, with commas")
    add("--examples", choices=("all", "held_out", "test"), default="all", help="all, or the 15%% held out, or the other 85%%")
    add("--no-fidelity", action="store_true", help="do not compare with the full cache token by token")
    if command.prog.endswith("plan"):
        add("--json", action="store_true", help="as JSON")
    else:
        add("--judge-url", help="an OpenAI-compatible endpoint that rates answers to instructions, such as http://host/v1")
        add("--judge-model", help="its model; the key is read from JUDGE_API_KEY or OPENAI_API_KEY")
        add("--judge-workers", type=int, default=8, help="questions to the judge under way at once (default: %(default)s)")
        add("--verify", action="store_true", help="sweep-speed only: decode every cell alone too, count differing answers")


def _add_importance(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_model(command)
    add("--kind", choices=("r", "er", "r2"), required=True, help="retrieval, enhanced retrieval, retrieval and reasoning")
    add("--needles", choices=("text", "facts"), help="English sentences, or those of the embedded model (default: by model)")
    add("--haystack", type=Path, help="folder of .txt files (default: generated prose)")
    add("--max-length", type=int, help="tokens of the longest prompt (default: 10,000, or what the model has positions for)")
    add("--lengths", type=int, default=5, help="evenly spaced up to the longest (default: %(default)s)")
    add("--depths", type=int, default=10, help="evenly spaced (default: %(default)s)")
    add("--attempts", type=int, default=100, help="needles hidden and asked for (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--teacher-forced", action="store_true", help="our own option: feed the right answers, for models too weak to give them")
    add("--out", type=Path, help="file for the scores (default: results/head_scores/<model>_<kind>.json)")


def _add_train(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_model(command)
    add("--conversion", required=True, help="gqa, mqa, mixsga, cla, or a plugin's; none trains the model as it is: the control")
    add("--recipe", help="mixsga-sft or mixsga-pretrain: the paper's data, rates and length; options below change it")
    add("--groups", type=int, help="KV heads merged into one by gqa")
    add("--percent", type=int, help="of the layers that cla stores: 50 for half")
    add("--ratios", help="of mixSGA's experts, which keep every head, half, a quarter, ...: 3:1:6")
    add("--ablation", help="gqa, mqa: first or random heads instead of means; mixsga: a random router")
    add("--text", type=Path, help="file or folder of .txt to heal on")
    add("--instruct", type=Path, help=".jsonl with prompt and output to heal on; only outputs are trained on")
    add("--data-dir", type=Path, help="folder with the recipe's data; for the embedded model, with lm/books")
    add("--length", type=int, help="tokens of a row of text (default: 1,024, or the recipe's)")
    add("--rows", type=int, help="of a batch of text (default: 4, or the recipe's)")
    add("--epochs", type=float, help="times through the recipe's data (default: the recipe's)")
    add("--steps", type=int, help="(default: 400, the embedded model 600, a recipe's epochs)")
    add("--lr", type=float, help="(default: 1e-3, the embedded model 3e-3)")
    add("--optimizer", choices=("adamw", "muon"), help="muon: for matrices, AdamW for the rest (default: adamw)")
    add("--router-lr", type=float, help="of mixSGA's routers (default: 1e-2)")
    add("--accumulate", type=int, help="batches a step (default: 1)")
    add("--loss", choices=("lm", "distill"), help="of the text, or to the parent's predictions (default: lm)")
    add("--trains", choices=("all", "kv"), help="every weight, or keys, values and routers (default: all)")
    add("--alpha", type=float, help="weight of mixSGA's consistency loss (default: 0.1)")
    add("--router-loss", choices=("logits", "sigmoid"), help="what its cross-entropy acts on (default: logits)")
    add("--checkpointing", action="store_true", default=None, help="of activations: less memory, more time")
    add("--shard-weights", action="store_true", help="with several processes: each holds a part of the weights (FSDP2)")
    add("--save-every", type=int, help="steps between checkpoints (default: 100)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--save-dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of saved weights (default: %(default)s)")
    add("--out", type=Path, help="folder of the variant (default: results/variants/<model>+<conversion>)")


def _add_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_plugin(command)
    add("--model", required=True, help="reference, random:<shape>, a folder or a hub id")
    add("--revision", help="of a hub id")
    add("--chat", choices=("raw", "template"), default="raw", help="(default: %(default)s)")
    add("--device", default=None, help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: float32 on a CPU, bfloat16 on a GPU)")


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
        from harness.request import REFUSED

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
    from harness.contract import first_fault
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
        from harness.speed import attention_speed, sweep_speed
        from methods import METHODS

        line = sweep_speed(METHODS, options.verify) if options.suite == "sweep-speed" else attention_speed()
        print(json.dumps(line))
        return 0
    from harness.cost_request import cost_behind
    from harness.evidence import record_command
    from harness.request import judge_request, run_request
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


def _cost(options: argparse.Namespace) -> int:
    from harness.cost_request import cost_request
    from harness.evidence import record_command

    failed = cost_request(options)
    record_command(options.out, options.arguments)
    return max(_report(options), 1 if failed else 0)


def _plan(options: argparse.Namespace) -> int:
    from harness.request import plan_request

    plans = plan_request(options)
    print(json.dumps(plans, indent=1) if options.json else "\n".join(_plan_line(plan) for plan in plans))
    return 0


def _plan_line(plan: dict[str, Any]) -> str:
    head = f"{plan['model']}: {plan['cells']} cells to run on {plan['prefills']} prompts, {plan['finished']} finished"
    return "\n".join([head, *(f"  skipped: {reason} ({count} cells)" for reason, count in plan["skipped"].items())])


def _list(options: argparse.Namespace) -> int:
    from harness.listing import listing

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
    from harness.request import importance_request
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
    from harness.train_request import train_request
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
    from harness.request import tokens_request
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
    from harness.evidence import record_command
    from harness.papers import HUB, table_of
    from harness.reproduce import reproduce_request
    from reports.paper import PaperRow, Side, write_side_by_side

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
            setting=_setting(row),
            values=row["values"],
            benchmarks={column: table.benchmarks(row, column, done.facts) for column in row["values"]},
            measured_with=one.method,
            command="" if one.model else one.command,
            numbers=done.numbers[place] if done.numbers else None,
        )
        for place, (row, one) in enumerate(zip(done.rows, done.asked, strict=True))
    ]
    title = f"{table.name}, {done.paper_model} in the paper, {done.model} here"
    averages = table.numbers["averages"]
    side = Side(table.name, title, done.settings, averages, table.scale, table.exponent)
    for path in write_side_by_side(options.out, side, rows, [(one.model, one.budget) for one in done.asked], done.keys):
        print(path)
    return 1 if done.failed else 0


def _setting(row: dict[str, Any]) -> str:
    parts = [row.get("budget") or row.get("ratios") or row.get("size"), row.get("task")]
    parts += [f"H2O keeps {row['h2o keeps']}"] if "h2o keeps" in row else []
    return ", ".join(str(part) for part in parts if part) or "-"


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
    from harness.contract import check_plugin

    broken = 0
    for finding in check_plugin(options.plugins[0]):
        broken += finding.wrong is not None
        print(f"{finding.entry}: {finding.check}: {'ok' if finding.wrong is None else f'NO: {finding.wrong}'}")
    return 1 if broken else 0


def _beta(options: argparse.Namespace) -> int:
    from harness.beta import beta_request

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
