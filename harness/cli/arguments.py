"""The command line: commands and their options. Nothing of the suite is imported to tell them.

An option that is not given is absent from what is parsed: defaults live in the requests alone (`harness.cli.requests`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

ABOUT = "The suite's command line. `python run_all.py` runs the default suite and writes its report; `--help` lists the rest."
DTYPES = ("float32", "bfloat16", "float16")


def parser(program: str = "run_all.py") -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog=program, description=ABOUT)
    commands = main.add_subparsers(dest="command", metavar="command")
    for name, (about, add_options) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about, argument_default=argparse.SUPPRESS)
        add_options(command)
    return main


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return Path(text)


def _add_run(command: argparse.ArgumentParser) -> None:
    _add_request(command)
    add = command.add_argument
    about = "add examples until half of every interval is at most this, of a metric's range (0.05), up to --limit"
    add("--precision", type=float, help=about)
    add("--judge-url", help="an OpenAI-compatible endpoint that rates answers to instructions, such as http://host/v1")
    add("--judge-model", help="its model; the key is read from JUDGE_API_KEY or OPENAI_API_KEY")
    add("--judge-workers", type=int, help="questions to the judge under way at once (default: 8)")


def _add_plan(command: argparse.ArgumentParser) -> None:
    _add_request(command)
    command.add_argument("--json", action="store_true", help="as JSON")


def _add_request(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_plugin(command)
    add("--suite", help="a suite of `list suites`; the options below narrow or change it (default: default)")
    add("--model", help="reference, smollm2, random:<shape>, a folder, a .gguf file or a hub id; several with commas")
    add("--revision", help="of a hub id")
    add("--methods", help="such as snapkv,h2o or snapkv(kernel=5); h2o:pyramid puts another allocator behind a scorer")
    add("--budgets", help="KV sizes (128) or shares of the full cache (25%%), with commas")
    add("--benchmarks", help="such as random_tokens(length=1024), with commas")
    add("--prompt", help="question_in, question_after, first_question, turns, turns_after; several with a comma")
    add("--chat", choices=("raw", "template"), help="(default: raw)")
    add("--granularity", choices=("kv", "query"), help="rows a KV head or a query head (default: kv)")
    add("--protect", help="first,last positions that every method protects, beside each at its own: 4,8 or 10%%,10%%")
    add("--routing", help="of a mixSGA prefill: expert_choice, argmax, or both (default: expert_choice)")
    add("--truncation", type=int, help="tokens of a prompt; longer ones keep their two ends (default: the model's positions)")
    add("--max-new-tokens", type=int, help="of an answer (default: the benchmark's)")
    add("--limit", type=int, help="examples of each benchmark")
    add("--seed", help="of generated examples and sampled answers; several with commas")
    add("--temperature", type=float, help="of sampled answers (default: the suite's; 0 is greedy)")
    add("--out", type=_path, help="folder for rows and report (default: results/default)")
    _add_device(command)
    add("--cell-bytes", type=int, help="rows of the cells decoded together, at most this many bytes")
    add("--contexts", help="cost suites: tokens of the prompts, with commas")
    add("--batches", help="cost suites: sequences decoded together, with commas; largest: as many as fit")
    add("--decode", help="cost suites: eager, graph (CUDA), compiled (and captured on a GPU), with commas (default: the suite's)")
    add("--rounds", type=int, help="cost suites: how often each latency is measured")
    add("--shard", help="i/n: the i-th of n shares of the examples (default: that of a task of a Slurm array, else 1/1)")
    add("--own-rows", action="store_true", help="rows in files of this process alone: for file systems whose locks are none")
    _add_workers(command)
    _add_data(command)
    add("--head-scores", help="files or folders of head scores (HeadKV) and statistics of queries (TriAttention), with commas")
    add("--examples", choices=("all", "held_out", "test"), help="all, or the 15%% held out, or the other 85%% (default: all)")
    add("--no-fidelity", action="store_true", help="do not compare with the full cache token by token")


def _add_list(command: argparse.ArgumentParser) -> None:
    kinds = ("methods", "allocators", "storages", "conversions", "recipes", "benchmarks", "suites", "models", "papers")
    command.add_argument("what", choices=kinds)
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--data-dir", type=_path, help="papers: where their data are looked for")
    _add_plugin(command)


def _add_report(command: argparse.ArgumentParser) -> None:
    about = "folder of the rows (default: results/default); of several, the others are also put beside the first"
    command.add_argument("--out", type=_path, action="append", help=about)
    command.add_argument("--pictures", help="formats of the pictures of scores, of png,svg,pdf (default: png,svg)")


def _add_publish(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--out", type=_path, action="append", help="folder of rows, or one published before; may be given several times")
    add("--to", type=_path, required=True, help="the folder to write: index.html, the runs' reports, rows.parquet, a data card")


def _add_importance(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_model(command)
    add("--kind", choices=("r", "er", "r2"), required=True, help="retrieval, enhanced retrieval, retrieval and reasoning")
    add("--chat", choices=("raw", "template"), help="(default: raw)")
    add("--needles", choices=("text", "facts"), help="English sentences, or those of the embedded model (default: by model)")
    add("--haystack", type=_path, help="folder of .txt files, or python for its manual (default: generated prose)")
    add("--max-length", type=int, help="tokens of the longest prompt (default: 10,000, or what the model has positions for)")
    add("--lengths", type=int, help="evenly spaced up to the longest (default: 5)")
    add("--depths", type=int, help="evenly spaced (default: 10)")
    add("--attempts", type=int, help="needles hidden and asked for (default: 100)")
    add("--seed", type=int, help="(default: 0)")
    add("--teacher-forced", action="store_true", help="our own option: feed the right answers, for models too weak to give them")
    add("--out", type=_path, help="file for the scores (default: results/head_scores/<model>_<kind>.json)")
    _add_workers(command)


def _add_calibrate(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_model(command)
    add("--haystack", type=_path, help="folder of .txt files, or python for its manual (default: generated prose)")
    add("--tokens", type=int, help="of text that is read (default: 16,384)")
    add("--length", type=int, help="tokens of a piece (default: 2,048, or what the model has positions for)")
    add("--seed", type=int, help="(default: 0)")
    add("--out", type=_path, help="file for the statistics (default: results/head_scores/<model>_queries.npz)")


def _add_train(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_model(command)
    add("--conversion", required=True, help="gqa, mqa, mixsga, cla, or a plugin's; none trains the model as it is: the control")
    add(
        "--recipe",
        help="mixsga-sft or mixsga-pretrain: the paper's data, rates and length; mixsga-plus: our start, on data of yours; "
        "options below change it",
    )
    add("--groups", type=int, help="KV heads merged into one by gqa")
    add("--percent", type=int, help="of the layers that cla stores: 50 for half")
    add(
        "--ratios",
        help="of mixSGA's experts, which keep every head, half, a quarter, ...: 3:1:6; or each with its heads a group: 1x1:2x3",
    )
    add(
        "--ablation",
        help="gqa, mqa: first or random heads instead of means; mixsga: random, or scaled (ours: learned scales); cla: first",
    )
    add(
        "--from-variant",
        type=_path,
        help="folder of a variant of the same model and conversion to go on from: say, instructions after text",
    )
    add("--text", type=_path, help="file or folder of .txt to heal on")
    add("--instruct", type=_path, help=".jsonl with prompt and output to heal on; only outputs are trained on")
    add("--data-dir", type=_path, help="folder with the recipe's data; for the embedded model, with lm/books")
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
    add(
        "--order",
        choices=("as_is", "likeness"),
        help="of the KV heads before they are grouped: likeness puts like heads together",
    )
    add("--align", action="store_true", help="rotate the heads of a group towards each other before they are averaged")
    add("--agree", type=float, help="share of the way that heads go to the mean of their widest group at first (default: 0)")
    add("--agree-on", choices=("kv", "k"), help="keys and values, or keys alone (default: kv)")
    add("--soft", type=float, help="share of the steps in which tokens go from a mixture of mixSGA's experts to one (default: 0)")
    add("--ramp", type=float, help="share of the steps in which mixSGA's experts go from 1:0:0 to their ratios (default: 0)")
    add("--routing", choices=("expert_choice", "argmax"), help="of training (default: expert_choice)")
    add("--layers", type=float, help="weight of the distance of attention outputs to the parent's (default: 0)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="multiply in bfloat16 (default: where the device has instructions)")
    add("--checkpointing", action="store_true", help="of activations: less memory, more time")
    add("--shard-weights", action="store_true", help="with several processes: each holds a part of the weights (FSDP2)")
    add("--save-every", type=int, help="steps between checkpoints (default: 100)")
    add("--seed", type=int, help="(default: 0)")
    add("--save-dtype", choices=("float32", "bfloat16"), help="of saved weights (default: bfloat16)")
    add("--out", type=_path, help="folder of the variant (default: results/variants/<model>+<conversion>)")


def _add_tokens(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--text", type=_path, required=True, help="file; its first tokens are read as one sequence")
    command.add_argument("--tokens", type=int, help="(default: 128)")
    command.add_argument("--out", type=_path, help="of .csv and .png (default: results/token_importance)")


def _add_beta(command: argparse.ArgumentParser) -> None:
    _add_request(command)
    command.add_argument("--betas", help="with commas (default: the paper's grid)")


def _add_score(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("benchmark", choices=("longbench",))
    add("path", type=_path, help="<task>.jsonl (.gz, .xz) of LongBench's own form, or a folder of them")
    add("--extended", action="store_true", help="LongBench-E: by length")
    add("--workers", type=int, help="processes (default: one a core)")
    add("--json", action="store_true", help="as JSON")


def _add_reproduce(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("table", help="such as headkv:table2; `list papers` names them, with what each needs")
    add("--model", help="reference, smollm2, a folder, a .gguf file or a hub id (default: the paper's)")
    add("--paper-model", help="which of the paper's models, a part of its name (default: the first)")
    add("--fair", action="store_true", help="a row a KV head and chat templates: equal bytes")
    add("--limit", type=int, help="examples of each task (default: 200)")
    add("--train", action="store_true", help="train the variants that are missing, by the paper's recipe")
    add("--steps", type=int, help="of that training, instead of the recipe's epochs")
    add("--epochs", type=float, help="of that training, instead of the recipe's")
    add("--instruct", type=_path, help="of that training: a .jsonl with prompt and output instead of Dolly-15k")
    add("--variants", type=_path, help="folder where trained variants are looked for and put (default: results/variants)")
    add("--context", type=int, help="tokens of the prompt, for tables of time (default: the paper's)")
    _add_data(command)
    add("--head-scores", help="files or folders of head scores (HeadKV) and statistics of queries (TriAttention), with commas")
    _add_device(command)
    _add_workers(command)
    add("--out", type=_path, help="(default: results/papers)")


def _add_bench(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "what",
        choices=("sweep", "methods", "attention", "linear", "storages", "evict", "variants", "kernel", "cluster"),
        help="31 cells beside their prefills; what each method adds; decode attention; prepacked linear layers; decode attention "
        "over packed rows; eviction while decoding; mixSGA beside GQA-2; Triton; many workers, simulated from recorded times",
    )
    add("--out", type=_path, help="cluster: folder of a run with --ray, whose times are taken (default: results/default)")
    add("--workers", type=int, help="cluster: simulated, beside 1, 8 and 64 (default: 1000)")
    add("--units", type=int, help="cluster: prompts, drawn from the recorded ones (default: 20 a worker)")
    add("--scale", type=float, help="cluster: units and loading take so many times as long as recorded (default: 1)")
    add("--verify", action="store_true", help="sweep: decode every cell alone too, and count the answers that differ")
    _add_device(command)


def _add_new(command: argparse.ArgumentParser) -> None:
    command.add_argument("kind", choices=("method", "allocator", "storage", "benchmark", "conversion"))
    command.add_argument("name", help="of what it brings; the file is NAME.py")


def _add_check(command: argparse.ArgumentParser) -> None:
    command.add_argument("plugin", help="the file")


def _add_plugin(command: argparse.ArgumentParser) -> None:
    about = "a file of your own with methods, benchmarks or conversions (see `new`); may be given several times"
    command.add_argument("--plugin", action="append", metavar="FILE.py", help=about)


def _add_model(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    _add_plugin(command)
    add("--model", required=True, help="reference, smollm2, random:<shape>, a folder, a .gguf file or a hub id")
    add("--revision", help="of a hub id")
    _add_device(command)


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda, cuda:1, auto: layers over all GPUs (default: cuda if there is one)")
    command.add_argument("--dtype", choices=DTYPES, help="(default: float32 on a CPU, bfloat16 on a GPU)")


def _add_workers(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--ray", metavar="local|ADDRESS", help="on workers of Ray: on this machine, or in a cluster by its head node's host:port")
    about = "that many processes on the CPU; with --ray: workers of Ray (default: as the GPUs are enough for, or one a core)"
    add("--workers", type=int, help=about)
    add("--gpus-per-worker", type=int, help="with --ray: of each worker (default: 1, where there are GPUs)")


def _add_data(command: argparse.ArgumentParser) -> None:
    about = "folder with data sets and published head scores; looked into before the hub"
    command.add_argument("--data-dir", type=_path, help=about)


COMMANDS = {
    "run": ("run a suite and write its report", _add_run),
    "plan": ("what `run` would do; runs nothing", _add_plan),
    "list": ("what there is", _add_list),
    "report": ("tables and plots from stored rows; no model is needed", _add_report),
    "publish": ("several runs as a web page: a leaderboard, their reports, all rows as one parquet file", _add_publish),
    "train": ("convert a model to GQA, MQA, mixSGA or CLA, heal it, save it as a variant", _add_train),
    "importance": ("estimate head scores for HeadKV, and draw them", _add_importance),
    "calibrate": ("take statistics of a model's queries, for TriAttention", _add_calibrate),
    "beta": ("choose HeadKV's beta on held-out examples, for `run --examples test`", _add_beta),
    "token-importance": (
        "average one token's keys and values over all heads: what becomes of the perplexity (mixSGA's figure 1)",
        _add_tokens,
    ),
    "score": ("official scores of predictions made elsewhere", _add_score),
    "reproduce": ("a paper's table: its numbers beside those measured here", _add_reproduce),
    "bench": ("what the harness itself costs; prints a JSON line", _add_bench),
    "new": ("start a plugin of your own from an example that runs at once", _add_new),
    "check": ("try what a plugin brings against what every method, benchmark and conversion must hold", _add_check),
}
