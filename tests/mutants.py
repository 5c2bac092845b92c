"""Breaks the code on purpose, fault by fault, in a copy, and wants the tests to fail each time. `make mutants`.

Names of faults as arguments: only these.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARTS = ("benchmarks", "docs", "harness", "methods", "reports", "results", "storages", "tests")


@dataclass(frozen=True)
class Fault:
    """One line of the code, and what a careless hand makes of it."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str = "tests/test_invariants.py tests/test_rows.py tests/test_methods.py tests/test_answer.py"


STARTS = "tests/test_starts.py"
PACKED = "tests/test_packed_rows.py tests/test_storages.py"
FAULTS = (
    Fault(
        "a second stage without values",
        "methods/criticalkv.py",
        "* output_norms(layer), scores",
        ", scores",
        "tests/test_scorers.py",
    ),
    Fault(
        "norms of the next head",
        "harness/engine/projections.py",
        "values[head // shape.group]",
        "values[0]",
        "tests/test_scorers.py",
    ),
    Fault("queries not turned back", "harness/engine/projections.py", "-sin / size", "sin / size", "tests/test_scorers.py"),
    Fault(
        "the prompt's own positions ahead",
        "harness/engine/projections.py",
        "angles[-1:] + ahead",
        "ahead",
        "tests/test_scorers.py",
    ),
    Fault(
        "half a turn of the covariance",
        "harness/engine/projections.py",
        "_turned(around.rotate, half.transpose(1, 2), *ahead)",
        "half.transpose(1, 2)",
        "tests/test_scorers.py",
    ),
    Fault("the repetition sees the future", "harness/engine/second_pass.py", ".triu(1)", ".triu(9)", "tests/test_scorers.py"),
    Fault(
        "the mean of a second pass", "harness/engine/second_pass.py", "share.amax(1)", "share.mean(1)", "tests/test_scorers.py"
    ),
    Fault(
        "chunks at the prompt's start",
        "harness/engine/second_pass.py",
        "into[:, stop - scores.shape[1] : stop] = scores",
        "into[:, : scores.shape[1]] = scores",
        "tests/test_scorers.py",
    ),
    Fault(
        "ranked in the whole prompt",
        "methods/lagkv.py",
        "spread.argsort(-1).argsort(-1) / self.lag",
        "spread",
        "tests/test_scorers.py",
    ),
    Fault("the mean case", "methods/defensivekv.py", ".amax(1).unflatten(0", ".mean(1).unflatten(0", "tests/test_scorers.py"),
    Fault("no safeguard", "methods/allocators.py", "(self.safeguard * even)", "(0 * even)", "tests/test_scorers.py"),
    Fault(
        "streaming heads first",
        "methods/duo_attention.py",
        "np.argsort(-np.round",
        "np.argsort(np.round",
        "tests/test_scorers.py",
    ),
    Fault(
        "its own ends stay protected",
        "methods/protect.py",
        "return self.ends\n",
        "return self.over.protected\n",
        "tests/test_scorers.py",
    ),
    Fault("a pattern of another model", "methods/duo_attention.py", "if owner != name:", "if False:", "tests/test_scorers.py"),
    Fault("ranking reversed", "methods/ranking.py", "descending=True, stable=True", "descending=False, stable=True"),
    Fault("ties to the earlier", "methods/ranking.py", "values.flip(1).argsort", "values.argsort"),
    Fault("positions renumbered", "harness/engine/rows.py", "[prefill.tokens] * len(selections)", "_mean_lengths(layers)"),
    Fault("causal mask dropped", "harness/engine/attention.py", "if tokens > 1:", "if tokens > 10**9:"),
    Fault("window dropped", "harness/engine/attention.py", "hidden(held, asking, layer.window)", "hidden(held, asking, None)"),
    Fault("prefill mutated", "methods/snapkv.py", "attention = layer", "layer.keys.mul_(1.01); attention = layer"),
    Fault("softcap dropped", "harness/logits.py", "if softcap is None else", "if True else"),
    Fault("question out of the window", "harness/engine/observe.py", "tokens - min(self.needs.window, tokens) :]", "-9:-1]"),
    Fault(
        "values of another row",
        "harness/engine/attention.py",
        "block.entries(layer.values)",
        "block.entries(layer.values).roll(1, 0)",
    ),
    Fault("slack read", "harness/engine/rows.py", "[:, : self.length]", "[:, : self.length + 1]"),
    Fault("remainder lost", "methods/sharing.py", "counts[open_rows] += 1", "total -= left"),
    Fault(
        "drafts not checked",
        "harness/engine/generate.py",
        "accepted = min(right, len(piece) - 1)",
        "accepted = len(piece) - 1",
    ),
    Fault(
        "drafts behind the end counted",
        "harness/engine/generate.py",
        "accepted = max(0, len(answer.tokens) - before - 1)",
        "accepted += 0",
    ),
    Fault(
        "ended cells' rows stay",
        "harness/engine/rows.py",
        "self.table.of(np.isin(self.table.cell, list(cells)))",
        "self.table.copy()",
    ),
    Fault(
        "merge ignores the sums",
        "harness/engine/attention.py",
        "weight = torch.exp(lse - top[reader])",
        "weight = torch.ones_like(lse)",
    ),
    Fault(
        "heads by order",
        "methods/headkv.py",
        "places[at, head] for head",
        "list(places.values())[at * width + head] for head",
        "tests/test_headkv.py",
    ),
    Fault("token match dropped", "methods/headkv.py", " & (ids[top] == said)", "", "tests/test_headkv.py"),
    Fault(
        "smaller fractions first", "methods/sharing.py", "np.argsort(-fractions", "np.argsort(fractions", "tests/test_headkv.py"
    ),
    Fault("scores of another model", "methods/headkv.py", "if ours != theirs or", "if False and", "tests/test_headkv.py"),
    Fault("wrong expert", "harness/families.py", "(assigned == number)", "(assigned == number - 1)", "tests/test_conversions.py"),
    Fault(
        "routing sees the future",
        "harness/engine/model.py",
        'self.route("argmax")',
        'self.route("expert_choice")',
        "tests/test_conversions.py",
    ),
    Fault(
        "tokens in every expert's rows",
        "harness/engine/rows.py",
        "takes = experts[token] == table.expert_group[row]",
        "takes = experts[token] >= 0",
        "tests/test_conversions.py",
    ),
    Fault(
        "padding routed",
        "methods/mixsga_router.py",
        "(segments >= 0) & (expert < 0)",
        "(expert < 0)",
        "tests/test_conversions.py",
    ),
    Fault(
        "heads of the wrong group",
        "harness/families.py",
        "keys[..., ::group, :]",
        "keys[..., : keys.shape[-2] // group, :]",
        "tests/test_conversions.py",
    ),
    Fault(
        "documents see each other",
        "harness/training/loop.py",
        "position_ids=batch.positions, attention_mask",
        "attention_mask",
        "tests/test_train.py",
    ),
    Fault("first line rule dropped", "benchmarks/longbench.py", "if kind.first_line:", "if False:", "tests/test_longbench.py"),
    Fault("luck of another place", "harness/engine/generate.py", "[len(answer.tokens) + n", "[n", "tests/test_answer.py"),
    Fault("lost row after a tear", "results/locks.py", 'b"\\n" if torn else b""', 'b""', "tests/test_store.py"),
    Fault("doubled rows", "results/store.py", 'if self._status.get(row.id) != "ok"]', "]", "tests/test_store.py"),
    Fault("lock dropped", "results/store.py", "with locked(self.rows):", "if True:", "tests/test_store.py"),
    Fault(
        "shards before the filter",
        "harness/evaluation/plan.py",
        "list(contexts.values())[self.shard.number - 1 :: self.shard.of]",
        "[mine for n, mine in contexts.items() if n % self.shard.of == self.shard.number - 1]",
        "tests/test_cluster.py",
    ),
    Fault(
        "finished cells sent out again",
        "harness/evaluation/spread.py",
        "if row in unit.finished)",
        "if False)",
        "tests/test_cluster.py",
    ),
    Fault(
        "a neighbour's death blamed",
        "harness/cluster/drive.py",
        'elif call.what == "run" and call in guilty:',
        "elif True:",
        "tests/test_drive.py",
    ),
    Fault(
        "units of the dead lost",
        "harness/cluster/drive.py",
        "        self.queue.put_back(units)\n\n    def _blame",
        "        pass\n\n    def _blame",
        "tests/test_drive.py",
    ),
    Fault(
        "retried for ever",
        "harness/cluster/drive.py",
        "if self.tries[unit] >= TRIES:",
        "if self.tries[unit] >= 5:",
        "tests/test_drive.py",
    ),
    Fault("short ones first", "harness/cluster/queue.py", "-_size(item[1])", "_size(item[1])", "tests/test_drive.py"),
    Fault(
        "files of other writers unread", "results/store.py", 'glob("*/*.jsonl")', 'glob("no/*.jsonl")', "tests/test_cluster.py"
    ),
    Fault(
        "array from 0", "harness/evaluation/request.py", "(task - first) // max(1, step) + 1", "task + 1", "tests/test_cluster.py"
    ),
    Fault(
        "cut in front of the question",
        "harness/evaluation/prompts.py",
        "start < min(stop, end + self.shift)]",
        "start <= end + self.shift]",
        "tests/test_prompts.py",
    ),
    Fault(
        "continuation scored from its second token",
        "harness/engine/scoring.py",
        "first = max(0, len(tokens) - scored - start)",
        "first = max(0, len(tokens) - scored - start + 1)",
        "tests/test_lm_eval.py",
    ),
    Fault(
        "context of the first request read for all",
        "harness/evaluation/loglikelihood.py",
        "if 2 * _common(together) >=",
        "if 10**9 + _common(together) >=",
        "tests/test_lm_eval.py",
    ),
    Fault("labels of the question count", "benchmarks/babilong.py", "and label not in asked", "", "tests/test_haystacks.py"),
    Fault("needle anywhere", "benchmarks/needle.py", "[round(depth * len(filler))]", "[0]", "tests/test_haystacks.py"),
    Fault("slack is read", "harness/engine/kernels.py", "held = t < end", "held = t < end + 7", "tests/test_kernels.py"),
    Fault(
        "pieces merged alike",
        "harness/engine/kernels.py",
        "weights = tl.exp(lse - base)",
        "weights = tl.where(there, 1.0, 0.0)",
        "tests/test_kernels.py",
    ),
    Fault(
        "an index on the host",
        "harness/engine/rows.py",
        "(numbers, device=self.keys.device)",
        "(numbers)",
        "tests/test_devices.py",
    ),
    Fault(
        "every expert_group grows",
        "harness/engine/static_decode.py",
        "if self.routed else 1)",
        "if False else 1)",
        "tests/test_captured.py",
    ),
    Fault("every row grows", "harness/engine/kernels.py", "length + taken.to(tl.int64)", "length + 1", "tests/test_captured.py"),
    Fault("a capture counts", "harness/engine/static_decode.py", "part.copy_(was)", "pass", "tests/test_captured.py"),
    Fault(
        "static window dropped",
        "harness/engine/static_decode.py",
        "there = there & (held",
        "_ = there & (held",
        "tests/test_captured.py",
    ),
    Fault(
        "a step brings numbers",
        "harness/engine/static_decode.py",
        "torch.arange(block.capacity, device=logits.device)",
        "torch.arange(block.capacity)",
        "tests/test_captured.py",
    ),
    Fault(
        "an append that changes nothing",
        "harness/engine/kernels.py",
        'mutates_args=("keys", "values", "positions", "length")',
        "mutates_args=()",
        "tests/test_captured.py",
    ),
    Fault(
        "positions of another cell",
        "harness/engine/static_decode.py",
        "seen.repeat_interleave(",
        "seen.repeat(",
        "tests/test_captured.py",
    ),
    Fault("room is read", "harness/engine/static_decode.py", "block.slack(pool).zero_()", "pass", "tests/test_captured.py"),
    Fault(
        "expert_groups merged alike",
        "harness/engine/static_decode.py",
        "with_sinks(torch.cat(weights)[self.parts], sinks)",
        "(torch.cat(weights)[self.parts] * 0 + 1)",
        "tests/test_captured.py",
    ),
    Fault(
        "Holm without its largest",
        "reports/statistics.py",
        "largest = max(largest, min",
        "largest = max(0.0, min",
        "tests/test_statistics.py",
    ),
    Fault("answers not escaped", "reports/page.py", "escape(cell.text)", "cell.text", "tests/test_page.py"),
    Fault(
        "observation left in the prefill", "benchmarks/latency.py", 'phases["prefill"] -= seconds', "pass", "tests/test_cost.py"
    ),
    Fault("layers kept while copied", "harness/engine/rows.py", "held[index] = kv = None", "pass", "tests/test_cost.py"),
    Fault(
        "plugins without a hash",
        "harness/registry.py",
        'f"+{sha}" for sha in found',
        '"" for sha in found',
        "tests/test_plugins.py",
    ),
    Fault(
        "answers read in the context",
        "harness/evaluation/loglikelihood.py",
        "max(1, min(len(one.context) for one in asked) - 1)",
        "min(len(one.context) for one in asked)",
        "tests/test_lm_eval.py",
    ),
    Fault(
        "worked examples by chance",
        "benchmarks/lm_eval_tasks.py",
        "task.set_fewshot_seed(FEWSHOT_SEED)",
        "pass",
        "tests/test_lm_eval.py",
    ),
    Fault(
        "shared layers stored twice",
        "harness/engine/model.py",
        "        if place.writes:",
        "        if True:",
        "tests/test_cla.py",
    ),
    Fault(
        "only the first reader's scores",
        "harness/engine/observe.py",
        "= _read_again(self.layers[stored], last, sums, settings.sinks, norms, ahead)",
        "= self.layers[stored]",
        "tests/test_cla.py",
    ),
    Fault("every process reads the same", "harness/training/loop.py", "* world + rank)", "* world)", "tests/test_recipes.py"),
    Fault(
        "padding is routed", "harness/training/loop.py", "numbers.masked_fill(~self.real, -1)", "numbers", "tests/test_recipes.py"
    ),
    Fault("evaluated records trained on", "harness/training/corpora.py", "not in known", "is not None", "tests/test_recipes.py"),
    Fault(
        "others' words before one's own",
        "harness/engine/generate.py",
        "for last in lasts for table in tables",
        "for last in lasts for table in reversed(tables)",
    ),
    Fault(
        "measured from the paper",
        "reports/paper.py",
        "    if ours is None:\n",
        "    ours = ours or Estimate(theirs, 0, 0, 1)\n    if ours is None:\n",
        "tests/test_papers.py",
    ),
    Fault(
        "unpaired differences",
        "reports/statistics.py",
        "set(ours) & set(baseline)",
        "set(ours) | set(baseline)",
        "tests/test_statistics.py",
    ),
    Fault(
        "a field called kind",
        "methods/base.py",
        "for name, part in parts if isinstance(part, UsesHeadScores)]",
        'for name, part in parts if hasattr(part, "kind")]',
        "tests/test_plugins.py",
    ),
    Fault("finished cells run again", "harness/evaluation/plan.py", "if cell not in self.finished]", "]", "tests/test_cli.py"),
    Fault("merged entries not stored", "harness/engine/rows.py", "if row.merged is None:", "if True:", "tests/test_rows.py"),
    Fault(
        "positions of merged entries",
        "harness/engine/rows.py",
        "else kv.positions[kept])",
        "else kv.positions[: len(kept)])",
        "tests/test_rows.py",
    ),
    Fault(
        "an arrow back up",
        "harness/cache.py",
        "from harness.logits import",
        "import harness.registry\nfrom harness.logits import",
        "tests/test_imports.py",
    ),
    Fault(
        "plugins checked by nobody",
        "harness/evaluation/conformance.py",
        "if plugin.path.is_file() and (fault",
        "if False and (fault",
        "tests/test_plugins.py",
    ),
    Fault("another quantisation, the same name", "harness/models/gguf.py", "-{self.quantisation}", "", "tests/test_gguf.py"),
    Fault(
        "weights drawn by chance",
        "harness/models/pretrained.py",
        "    if said:\n",
        "    if said == 0:\n",
        "tests/test_checkpoints.py",
    ),
    Fault(
        "no number is perfect fidelity",
        "harness/engine/scoring.py",
        "shares * (full - ours)).sum(-1)",
        "shares * (full - ours)).nan_to_num(0.0).sum(-1)",
    ),
    Fault(
        "no number is a finished cell",
        "harness/evaluation/sweep.py",
        "if not math.isfinite(value)}",
        "if value is None}",
        "tests/test_checkpoints.py",
    ),
    Fault(
        "a head of its own lost",
        "harness/models/pretrained.py",
        'if getattr(network.config, "tie_word_embeddings", False) and not is_tied(network):',
        "if False:",
        "tests/test_checkpoints.py",
    ),
    Fault("queries stay where their heads went", "harness/training/starts.py", "part[readers]", "part[:]", STARTS),
    Fault(
        "rotated values are read unrotated",
        "harness/training/align.py",
        "_rotate(handle.values(), [columns]",
        "_rotate(handle.values(), []",
        STARTS,
    ),
    Fault(
        "keys rotated across RoPE",
        "harness/training/align.py",
        "rotations(one.keys, one.rotary)",
        "rotations(one.keys, 0)",
        STARTS,
    ),
    Fault(
        "a window that only the mask tells is forgotten",
        "harness/engine/model.py",
        "window=self.observer.shape.windows[place.cache_layer]",
        "window=None",
        "tests/test_families.py",
    ),
    Fault(
        "a variant is begun again instead of healed further",
        "harness/training/request.py",
        "model.network = network.to(model.device)",
        "conversion.apply(model.network)",
        "tests/test_train.py",
    ),
    Fault(
        "a likelihood that saw the future stands alone",
        "harness/evaluation/plan.py",
        "elif sees_ahead(task):",
        "elif False:",
        "tests/test_haystacks.py",
    ),
    Fault(
        "a paper's perplexity is asked in two ways",
        "reports/paper.py",
        "line.label.name == row.measured_with and not line.label.causal]",
        "line.label.name == row.measured_with]",
        "tests/test_papers.py",
    ),
    Fault("a ruined model is healed", "harness/training/starts.py", "if not moved <= MOVED", "if False and moved", STARTS),
    Fault(
        "heads rotated apart",
        "harness/training/align.py",
        "towards[:, second, first] - towards[:, first, second]",
        "towards[:, first, second] - towards[:, second, first]",
        STARTS,
    ),
    Fault(
        "a layout of old weights",
        "harness/engine/prepacked.py",
        "self.weight is None or self.made_of != now",
        "self.weight is None",
        "tests/test_prepacked.py",
    ),
    Fault(
        "layers stay replaced",
        "harness/engine/prepacked.py",
        'vars(packed.layer).pop("forward", None)',
        "pass",
        "tests/test_prepacked.py",
    ),
    Fault(
        "who asks for sums moves the rest",
        "harness/engine/model.py",
        "if all_of_it and self.joined:",
        "if all_of_it and self.joined and self.observer.needs.column_sums:",
        "tests/test_methods.py",
    ),
    Fault("values agree where keys were asked for", "harness/training/starts.py", 'recipe.agree_on == "kv"', "True", STARTS),
    Fault("the fine experts get their ratios at once", "methods/mixsga_router.py", "parts * done *", "parts *", STARTS),
    Fault(
        "argmax learns from itself",
        "methods/mixsga_router.py",
        "self.wanted.flatten(), ignore",
        "self.assigned.flatten(), ignore",
        STARTS,
    ),
    Fault(
        "averaged values are scaled as well",
        "harness/families.py",
        "keys=self.routes",
        "keys=True",
        "tests/test_starts.py tests/test_conversions.py",
    ),
    Fault(
        "a soft token has its experts evenly",
        "harness/families.py",
        ".mul(weights[..., None, None, :]).sum(-1)",
        ".mean(-1)",
        STARTS,
    ),
    Fault("routing stays soft", "harness/training/loop.py", "1 - step / (recipe.soft", "1 - 0 / (recipe.soft", STARTS),
    Fault("soft in use", "methods/mixsga_router.py", "if self.training and self.softness:", "if self.softness:", STARTS),
    Fault("a touchy variant is refused", "harness/models/variants.py", "2 * moved", "0 * moved", STARTS),
    Fault(
        "another model under a variant's name",
        "harness/models/variants.py",
        "> max(ALIKE",
        "> max(99",
        "tests/test_checkpoints.py",
    ),
    Fault(
        "scaled positions forgotten",
        "harness/engine/model.py",
        "max(positions, int(",
        "min(positions, int(",
        "tests/test_checkpoints.py",
    ),
    Fault(
        "stop texts without special tokens",
        "harness/evaluation/sweep.py",
        "partial(model.words, special=True)",
        "partial(model.words, special=False)",
        "tests/test_checkpoints.py",
    ),
    Fault(
        "a stop text a token a letter",
        "harness/engine/generate.py",
        "len(text.encode())",
        "len(text)",
        "tests/test_checkpoints.py",
    ),
    Fault(
        "two begin tokens",
        "harness/evaluation/prompts.py",
        'special = chat == "raw" and not writes_begin(tokenizer, given)',
        'special = chat == "raw"',
        "tests/test_prompts.py",
    ),
    Fault("an end token behind a prompt", "harness/evaluation/tokens.py", "- behind] for", "- 0] for", "tests/test_prompts.py"),
    Fault(
        "tokens never had",
        "harness/evaluation/tokens.py",
        "if largest <",
        "if -1 <",
        "tests/test_checkpoints.py",
    ),
    Fault(
        "a text of another encoding",
        "benchmarks/data.py",
        'raw.decode("utf-8")',
        'raw.decode("utf-8", errors="replace")',
        "tests/test_haystacks.py",
    ),
    Fault(
        "holes are not filled",
        "harness/engine/evict.py",
        "pool.index_copy_(0, holes, pool[movers])",
        "pass",
        "tests/test_evict.py",
    ),
    Fault(
        "what a step attended to is forgotten",
        "harness/engine/attention.py",
        "+= received.sum(1)",
        "+= 0.0",
        "tests/test_evict.py",
    ),
    Fault(
        "newest queries are forgotten",
        "harness/engine/model.py",
        "layer.memory.see(query, self.step)",
        "pass",
        "tests/test_evict.py",
    ),
    Fault(
        "ranks do not close up",
        "harness/engine/renumber.py",
        "(staying.cumsum(1) - 1)",
        "torch.arange(ranks.shape[1]).expand_as(ranks)",
        "tests/test_renumber.py",
    ),
    Fault(
        "beyond the positions nobody is asked",
        "harness/evaluation/plan.py",
        "if keeper is None or not renumbers(keeper) or cell.budget is None:",
        "if keeper is None or cell.budget is None:",
        "tests/test_renumber.py",
    ),
    Fault(
        "remembered queries stay turned",
        "harness/engine/renumber.py",
        "turn(cell, last, back=True)",
        "turn(cell, last * 0, back=True)",
        "tests/test_renumber.py",
    ),
    Fault(
        "evicted a token early",
        "harness/engine/evict.py",
        "if since >= keeper.every",
        "if since + 1 >= keeper.every",
        "tests/test_evict.py",
    ),
    Fault(
        "the embedded model before a real one",
        "reports/front.py",
        "family.at.model == EMBEDDED,\n        -len",
        "False,\n        -len",
        "tests/test_answers.py",
    ),
    Fault(
        "parts of a piece at its start",
        "harness/engine/scoring.py",
        "yield start + place,",
        "yield start,",
        "tests/test_answer.py",
    ),
    Fault(
        "later keys of a softcap weigh next to nothing",
        "harness/engine/observe.py",
        "weights[..., begin - first :].masked_fill_(unseen, 0.0)",
        "pass",
        "tests/test_families.py",
    ),
    Fault(
        "what the model cannot do is ranked",
        "reports/places.py",
        "for example in shared) <= 0",
        "for example in shared) < 0",
        "tests/test_answers.py",
    ),
    Fault(
        "what left the window stays",
        "harness/engine/evict.py",
        "inside = positions >= ",
        "inside = positions >= 0 * ",
        "tests/test_evict.py",
    ),
    Fault(
        "the newest keys are redundant",
        "methods/rkv.py",
        "(0, latest, -similarity)",
        "(0, latest, 0 * similarity)",
        "tests/test_methods.py",
    ),
    Fault(
        "any alike key for the latest",
        "methods/rkv.py",
        "torch.where(found > alike, there, -1).amax(1)",
        "(found > alike).int().argmax(1) + first",
        "tests/test_methods.py",
    ),
    Fault(
        "no logit below its query's largest",
        "harness/engine/observe.py",
        "keepdim=True).sub_(LOWEST)",
        "keepdim=True)",
        "tests/test_methods.py",
    ),
    Fault(
        "later keys weigh next to nothing",
        "harness/engine/observe.py",
        "newest.masked_fill_(unseen, 0.0)",
        "pass",
        "tests/test_methods.py",
    ),
    Fault(
        "half of what grew is forgotten",
        "harness/engine/evict.py",
        "tokens * before.entries + entries * (tokens + 1) // 2",
        "tokens * before.entries + entries * tokens // 2",
        "tests/test_evict.py",
    ),
    Fault(
        "a turn within the answer is not waited for",
        "harness/evaluation/sweep.py",
        "return alike and read < keeper.every and",
        "return alike and",
        "tests/test_evict.py",
    ),
    Fault(
        "a variance about nothing",
        "methods/cake.py",
        "(attention - mean[:, None])",
        "attention.clone()",
        "tests/test_scorers.py",
    ),
    Fault(
        "other records in one mean",
        "reports/names.py",
        "which = [data[key.benchmark][key.data], ",
        "which = [",
        "tests/test_report.py",
    ),
    Fault(
        "stopped without a checkpoint",
        "harness/training/loop.py",
        "== recipe.steps or stopped()",
        "== recipe.steps",
        "tests/test_train.py",
    ),
    Fault("lengths of answers in one line", "reports/names.py", "if len(lengths[where]) > 1", "if False", "tests/test_report.py"),
    Fault("two weights, one name", "reports/names.py", "if len(revisions) == 1:", "if revisions:", "tests/test_report.py"),
    Fault(
        "names of pictures cut",
        "reports/pictures.py",
        '.exists())\n    return next(free, folder / f"{cut}_{len(list(folder.iterdir()))}{ending}")',
        ")\n    return next(free)",
        "tests/test_report.py",
    ),
    Fault("a null becomes the word None", "benchmarks/data.py", 'return ""', 'return "None"', "tests/test_longbench.py"),
    Fault("one question a document", "benchmarks/loogle.py", '"Q": row["question"]', '"Q": "?"', "tests/test_haystacks.py"),
    Fault("no number counts", "results/record.py", "or broken is None:", "or True:", "tests/test_report.py"),
    Fault(
        "values of another type",
        "results/record.py",
        "if wrong := wrong_field(",
        "if False and wrong_field(",
        "tests/test_report.py",
    ),
    Fault(
        "sinks of rows dropped",
        "harness/engine/attention.py",
        "lse.new_zeros(queries) if sinks is None else torch.exp(sinks - top)",
        "lse.new_zeros(queries)",
        "tests/test_families.py",
    ),
    Fault(
        "sinks of the kernel dropped",
        "harness/engine/kernels.py",
        "if SUNK:",
        "if SUNK and False:",
        "tests/test_families.py",
    ),
    Fault(
        "sinks of static steps dropped",
        "harness/engine/static_decode.py",
        "shares = with_sinks(torch.cat(weights)[self.parts], sinks)",
        "shares = with_sinks(torch.cat(weights)[self.parts], None)",
        "tests/test_families.py",
    ),
    Fault(
        "sinks not observed",
        "harness/engine/observe.py",
        "if settings.sinks is not None:",
        "if False:",
        "tests/test_families.py",
    ),
    Fault(
        "sinks not scored",
        "harness/cache.py",
        'float("-inf")), self.sinks)',
        'float("-inf")), None)',
        "tests/test_families.py",
    ),
    Fault(
        "a chunk slides",
        "harness/logits.py",
        "if isinstance(window, Chunk) else",
        "if False else",
        "tests/test_families.py",
    ),
    Fault(
        "a chunk slides in the kernel",
        "harness/engine/kernels.py",
        "if CHUNKED:",
        "if CHUNKED and False:",
        "tests/test_families.py",
    ),
    Fault(
        "the check lets all pass",
        "harness/engine/self_check.py",
        "if not difference <= (2 * most if coarse else most):",
        "if False:",
        "tests/test_families.py",
    ),
    Fault(
        "masks not compared as rules",
        "harness/engine/self_check.py",
        "if not torch.equal(shown, ~hidden(held, asking, window)):",
        "if False:",
        "tests/test_families.py",
    ),
    Fault(
        "weights that are no numbers",
        "harness/engine/self_check.py",
        "    _refuse_nan(model, own)\n",
        "    pass\n",
        "tests/test_families.py",
    ),
    Fault(
        "bytes of the widest heads",
        "harness/engine/rows.py",
        "return self.table.length * self.entry_bytes",
        "return self.table.length * self.shape.entry_bytes()",
        "tests/test_families.py",
    ),
    Fault(
        "scaled by the place in a step",
        "harness/engine/model.py",
        "scale(positions) / scale(given)",
        "scale(given) / scale(given)",
        "tests/test_families.py",
    ),
    Fault(
        "norms over all heads converted",
        "harness/families.py",
        "weight.numel() != handle.head_dim:",
        "False:",
        "tests/test_families.py",
    ),
    Fault(
        "keys turned and not turned are shared",
        "harness/layer_sharing.py",
        'getattr(member.attention, "use_rope", True) for',
        "True for",
        "tests/test_families.py",
    ),
    Fault(
        "keys of another kind of layer",
        "harness/layer_sharing.py",
        "stored[layer.layer_type] = writers",
        'stored = dict.fromkeys(("sliding_attention", "full_attention"), writers)',
        "tests/test_families.py",
    ),
    Fault(
        "pairs not corrected", "reports/ranking.py", "np.maximum.accumulate(flipped, axis=1)", "flipped", "tests/test_ranking.py"
    ),
    Fault("ranks reversed", "reports/ranking.py", "(values > mine)", "(values < mine)", "tests/test_ranking.py"),
    Fault("many examples weigh more", "reports/ranking.py", " / task.shape[1] for task", " for task", "tests/test_answers.py"),
    Fault(
        "looks not counted", "reports/statistics.py", "return 1 - (1 - LEVEL) / looks", "return LEVEL", "tests/test_ranking.py"
    ),
    Fault(
        "more bytes at one budget",
        "reports/answers.py",
        "if cell.byte_share <= share * (1 + AS_MANY)]",
        "]",
        "tests/test_answers.py",
    ),
    Fault("a control is the best", "reports/drawing.py", "if point.share < WHOLE or", "if True or", "tests/test_answers.py"),
    Fault("a control in colour", "reports/plots.py", "NOTHING_SAVED = 4.0", "NOTHING_SAVED = 0.0", "tests/test_answers.py"),
    Fault(
        "frontier of the worst",
        "reports/drawing.py",
        "sign = -1.0 if self.lower_is_better else 1.0",
        "sign = 1.0",
        "tests/test_answers.py",
    ),
    Fault(
        "a failed row takes the place of a done one",
        "results/published.py",
        'if held is None or held.status != "ok":',
        "if True:",
        "tests/test_publish.py",
    ),
    Fault("times of the farthest budget", "reports/front.py", "cost = min(mine,", "cost = max(mine,", "tests/test_answers.py"),
    Fault(
        "a residual's block early",
        "harness/storage.py",
        "before // storage.residual *",
        "-(-before // storage.residual) *",
        PACKED,
    ),
    Fault(
        "a value leaves late",
        "harness/storage.py",
        "older = before - storage.residual",
        "older = before - 1 - storage.residual",
        PACKED,
    ),
    Fault("scales of the residual forgotten", "harness/storage.py", "(entries - packed) * (HALF * dim)", "0", PACKED),
    Fault("spared layers packed", "harness/storage.py", "Sixteen() if min(layer,", "storage if min(layer,", PACKED),
    Fault(
        "distances counted from the first token",
        "methods/triattention.py",
        "where = tokens - 1 + 2.0",
        "where = 2.0",
        "tests/test_triattention.py",
    ),
    Fault(
        "what the mean does not tell left out",
        "methods/triattention.py",
        "size - np.abs(usual)",
        "size * 0",
        "tests/test_triattention.py",
    ),
    Fault(
        "every row read by the first heads",
        "harness/engine/evict.py",
        "heads=memory.heads(first, width),",
        "heads=torch.arange(len(rows) * reading),",
        "tests/test_triattention.py",
    ),
    Fault("codes of another head", "harness/engine/rows.py", "packed.codes(kv.keys[head],", "packed.codes(kv.keys[0],", PACKED),
    Fault(
        "shared rows scored by their last layer",
        "harness/papers/importance.py",
        "return scores / readers",
        "return scores",
        "tests/test_headkv.py",
    ),
    Fault("upper bit lost", "storages/bits.py", "bitwise_or_(plane << shift)", "bitwise_or_(plane)", PACKED),
    Fault(
        "rotation undone twice",
        "storages/turbo.py",
        "return self.turn(self._rotated(parts, dim) *",
        "return (self._rotated(parts, dim) *",
        PACKED,
    ),
    Fault(
        "levels unscaled",
        "storages/turbo.py",
        "norm / looked_up(table, codes).norm(dim=-1, keepdim=True)",
        "norm / sqrt(dim)",
        PACKED,
    ),
    Fault(
        "least left out of the products",
        "storages/integers.py",
        ".addcmul_(turned.sum(-1, keepdim=True), least.float().mT)",
        "",
        PACKED,
    ),
    Fault(
        "drafts packed for good",
        "harness/engine/packed_attention.py",
        "block.length - block.tokens + new",
        "block.length + 0 * new",
        PACKED,
    ),
    Fault(
        "a budget in entries",
        "methods/packed.py",
        "scores, total * prefill.shape.deployed_bytes()",
        "scores, total * prefill.shape.entry_bytes()",
        PACKED,
    ),
    Fault(
        "a first question that keeps its place",
        "harness/evaluation/sweep.py",
        "cache.seen = cache.seen - len(self.prompt.looked)",
        "cache.seen = cache.seen - 0",
        "tests/test_turns.py",
    ),
    Fault(
        "a first question that stays",
        "harness/evaluation/reading.py",
        "stay = positions[kept] < end",
        "stay = positions[kept] >= 0",
        "tests/test_turns.py",
    ),
    Fault(
        "one context's rows for another's question",
        "harness/evaluation/reading.py",
        "same = self.ids == read_of(prompt) and",
        "same = len(self.ids) == len(read_of(prompt)) and",
        "tests/test_turns.py",
    ),
    Fault(
        "memory that another sweep has read into",
        "harness/evaluation/sweep.py",
        "return self._reading if self._reading is self.arena.tenant else None",
        "return self._reading",
        "tests/test_turns.py",
    ),
    Fault(
        "draws of one problem as if each were a problem",
        "reports/statistics.py",
        "total = np.zeros(chunk)",
        "total, sizes, starts = np.zeros(chunk), np.ones_like(sizes), np.arange(len(sizes))",
        "tests/test_turns.py",
    ),
    Fault(
        "a row's weight in a merge is its mean",
        "harness/engine/attention.py",
        "weights.amax(-1).flatten()",
        "weights.mean(-1).flatten()",
        "tests/test_conversions.py",
    ),
    Fault(
        "a row that a reader sees nothing of counts",
        "harness/engine/attention.py",
        '        lse.nan_to_num_(nan=float("-inf"))\n        weights.nan_to_num_()\n',
        "        pass\n",
        "tests/test_conversions.py tests/test_families.py",
    ),
    Fault(
        "an answer begun a token too far",
        "harness/engine/scoring.py",
        "mine[: agreeing(mine, self.tokens) + 1]",
        "mine[: agreeing(mine, self.tokens) + 2]",
        "tests/test_answer.py",
    ),
    Fault(
        "an answer begun by the neighbour's tokens",
        "harness/engine/scoring.py",
        "own[cell * places : (cell + 1) * places]",
        "own[:places]",
        "tests/test_answer.py",
    ),
    Fault(
        "places of the answer counted from its first token",
        "harness/engine/scoring.py",
        "[start + 1 + place for",
        "[start + place for",
        "tests/test_answer.py",
    ),
    Fault(
        "more workers than there is memory for",
        "harness/cluster/crews.py",
        "min(cores_here(), free // worker_bytes)",
        "cores_here()",
        "tests/test_cluster.py -k small_models",
    ),
    Fault(
        "a suite's own numbers of examples for whatever is asked",
        "harness/evaluation/plan.py",
        "if request.limit is not None or request.benchmarks:",
        "if False:",
        "tests/test_cli.py -k other_numbers",
    ),
    Fault(
        "a question that holds its answer",
        "benchmarks/manual_questions.py",
        "tuple(lines[1:])",
        "tuple(lines)",
        "tests/test_haystacks.py -k manual",
    ),
    Fault(
        "a fork's exit code lost",
        "harness/cost/forks.py",
        "os.waitstatus_to_exitcode(status)",
        "0",
        "tests/test_cost.py -k forks",
    ),
    Fault("shares of another type", "harness/evaluation/unit.py", "if outcome.packed else", "if False else", PACKED),
)
HELPER = """

def _mean_lengths(layers):
    return [int(layers[0].table.length.mean())] * (int(layers[0].table.cell.max()) + 1)
"""


def survives(fault: Fault) -> bool:
    """True if the tests pass with the fault: they would not notice it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in PARTS:
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "default"))
        for file in ("run_all.py", "pyproject.toml"):
            shutil.copy(ROOT / file, copy / file)
        path = copy / fault.file
        text = path.read_text()
        path.write_text(text.replace(fault.right, fault.wrong) + (HELPER if "_mean_lengths" in fault.wrong else ""))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", *fault.tests.split()]
        return subprocess.run(command, cwd=copy, capture_output=True, check=False).returncode == 0


def main() -> int:
    alive = []
    if stale := [fault.name for fault in FAULTS if fault.right not in (ROOT / fault.file).read_text()]:
        raise SystemExit(f"the code has changed under these faults: {', '.join(stale)}")
    asked = [fault for fault in FAULTS if not sys.argv[1:] or fault.name in sys.argv[1:]]
    for fault in asked:
        noticed = not survives(fault)
        print(f"{'noticed ' if noticed else 'SURVIVES'}  {fault.name}", flush=True)
        alive += [] if noticed else [fault.name]
    print(f"{len(asked) - len(alive)} of {len(asked)} faults noticed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
