"""The other side of `compare.py`: runs in an environment of its own that has kvpress, and imports nothing of ours.

Called as `python kvpress_side.py FOLDER`: reads FOLDER/model and FOLDER/task.json, writes FOLDER/kvpress.json. Every cell is run
as kvpress's own pipeline does: a prefill of the context under the press, then the question, then greedy tokens.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    ChunkKVPress,
    CriticalKVPress,
    CURPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    LagKVPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses.scorer_press import ScorerPress
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

logging.disable_progress_bar()


OVER_SNAPKV = {"criticalkv": CriticalKVPress, "chunkkv": ChunkKVPress}
ALONE = {
    "streaming_llm": StreamingLLMPress,
    "tova": TOVAPress,
    "knorm": KnormPress,
    "keydiff": KeyDiffPress,
    "lagkv": LagKVPress,
    "cur": CURPress,
    "expected_attention": ExpectedAttentionPress,
    "kvzip": KVzipPress,
}


def press_of(method: str, share: float, window: int, kernel: int) -> Any:
    ratio = 1 - share
    if method == "snapkv":
        return SnapKVPress(ratio, window_size=window, kernel_size=kernel)
    if method == "pyramidkv":
        return PyramidKVPress(ratio, window_size=window, kernel_size=kernel)
    if method == "ada_snapkv":
        return AdaKVPress(SnapKVPress(ratio, window_size=window, kernel_size=kernel))
    if method in OVER_SNAPKV:
        return OVER_SNAPKV[method](SnapKVPress(ratio, window_size=window, kernel_size=kernel))
    return ALONE[method](ratio)


def watched(press: Any, kept: list[list[list[int]]]) -> Any:
    """Has a press note which positions it keeps, layer by layer: those that its own `compress` takes of its own scores."""
    if not isinstance(press, ScorerPress | ChunkKVPress) or isinstance(press, PyramidKVPress):
        return press
    plain = press.compress

    def compress(module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        before = keys
        keys, values = plain(module, hidden_states, keys, values, attentions, kwargs)
        layer = []
        for head in range(keys.shape[1]):
            same = torch.cdist(keys[0, head].double(), before[0, head].double()).argmin(
                1
            )  # every kept key lies among the old ones
            layer.append(sorted(same.tolist()))
        kept.append(layer)
        return keys, values

    press.compress = compress
    return press


def unmasked(model: Any, tokens: int) -> list[list[list[int]]]:
    """[L][H] positions that a press which masks leaves; empty where it masks nothing."""
    found = []
    for layer in model.model.layers:
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is None:
            return []
        heads = torch.ones(model.config.num_key_value_heads, tokens, dtype=torch.bool)
        heads[masked[1].cpu(), masked[2].cpu()] = False
        found.append([row.nonzero()[:, 0].tolist() for row in heads])
    return found


def forget(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None


@torch.inference_mode()
def run(model: Any, press: Any, prompt: list[int], context: int, new_tokens: int) -> dict[str, Any]:
    ids = torch.tensor([prompt])
    cache: Any = DynamicCache()
    start = time.perf_counter()
    if press is None:
        model.model(input_ids=ids[:, :context], past_key_values=cache)
    else:
        with press(model):
            model.model(input_ids=ids[:, :context], past_key_values=cache)
    read = time.perf_counter() - start
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    places = torch.arange(context, len(prompt))[None]
    logits = model(input_ids=ids[:, context:], past_key_values=cache, position_ids=places, logits_to_keep=1).logits
    said = [int(logits[0, -1].argmax())]
    for place in range(len(prompt), len(prompt) + new_tokens - 1):
        token = torch.tensor([[said[-1]]])
        logits = model(input_ids=token, past_key_values=cache, position_ids=torch.tensor([[place]])).logits
        said.append(int(logits[0, -1].argmax()))
    return {"prefill_s": read, "total_s": time.perf_counter() - start, "bytes": held, "tokens": said}


def main(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(task["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    model.set_attn_implementation("sdpa")
    run(model, None, task["prompts"][0], task["context"], 2)  # warms up
    rows = []
    of_every_prompt = task.get("kept_of_every_prompt", False)
    for number, prompt in enumerate(task["prompts"]):
        for method, share in task["cells"]:
            row = {"prompt": number, "method": method, "share": share}
            forget(model)
            places: list[list[list[int]]] = []
            try:
                press = None if method == "full" else press_of(method, share, task["window"], task["kernel"])
                press = watched(press, places) if of_every_prompt else press
                found = run(model, press, prompt, task["context"], task["new_tokens"])
                if of_every_prompt and press is not None:
                    found["kept"] = places or unmasked(model, task["context"])
                rows.append(row | found)
            except Exception as error:  # whatever another package raises is a finding, not a crash
                rows.append(row | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
    kept = []
    for method, share in () if of_every_prompt else task["cells"]:
        positions: list[list[list[int]]] = []
        if method != "full":
            press = watched(press_of(method, share, task["window"], task["kernel"]), positions)
            with torch.inference_mode(), press(model):
                model.model(input_ids=torch.tensor([task["prompts"][0][: task["context"]]]), past_key_values=DynamicCache())
        kept.append(positions)
    found = {"version": version("kvpress"), "transformers": version("transformers"), "rows": rows, "kept": kept}
    (folder / "kvpress.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
