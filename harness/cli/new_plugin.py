"""`run_all.py new method my_method`: a plugin file that runs at once, from the example of its kind."""

from __future__ import annotations

from pathlib import Path

from benchmarks import GROUPS
from harness.errors import BadRequest
from harness.registry import NAME, TABLES, Registry

PACKAGED = Path(__file__).parents[1] / "plugin_examples"  # where a wheel holds them
EXAMPLES = PACKAGED if PACKAGED.is_dir() else Path(__file__).parents[2] / "docs" / "plugins"
THEIRS = {
    "method": "large_values",
    "allocator": "middle_layers",
    "storage": "signs_and_means",
    "benchmark": "capitals",
    "conversion": "keep_first",
}


def start_plugin(kind: str, name: str, registry: Registry) -> Path:
    """Writes NAME.py into the current folder.

    Raises:
        BadRequest: a name that cannot be used or is taken, or a file that is there or cannot be written.
    """
    path = Path(f"{name}.py")
    if not NAME.fullmatch(name):
        raise BadRequest(f"{name!r} is no name of letters, digits and underscores")
    if name in GROUPS or any(name in registry.table(table) for table in TABLES):
        raise BadRequest(f"{name!r} is the name of something that is there already: choose another")
    if path.exists():
        raise BadRequest(f"{path} is there already")
    text = (EXAMPLES / f"{kind}.py").read_text(encoding="utf-8").replace(THEIRS[kind], name)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"cannot write {path}: {error.strerror}; go to a folder that can be written to") from None
    return path
