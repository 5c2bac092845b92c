"""The command line: commands and their options. No model is needed to tell them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

OUT = Path("results/default")
ABOUT = "The suite's command line. `python run_all.py` runs the default suite and writes its report; `--help` lists the rest."


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="run_all.py", description=ABOUT)
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
    about = "convert a model to GQA, MQA, mixSGA or CLA, heal it, save it as a variant"
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
    add("--batches", help="cost suites: sequences decoded together, with commas; largest: as many as fit")
    add("--decode", help="cost suites: eager, graph (CUDA), compiled (and captured on a GPU), with commas (default: the suite's)")
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
    add("--ablation", help="gqa, mqa: first or random heads instead of means; mixsga: random; cla: first")
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
