"""Plugin files on their way to workers: the text travels, so that a node need not have the file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.registry import BadPlugin, Registry, registry_of


@dataclass(frozen=True)
class PluginFile:
    """A file, where it lay and what it held."""

    path: Path
    text: bytes

    @classmethod
    def read(cls, path: Path) -> PluginFile:
        """
        Raises:
            BadPlugin: it cannot be read.
        """
        try:
            return cls(path.absolute(), path.read_bytes())
        except OSError as error:
            raise BadPlugin(f"plugin {path}: {error.strerror}") from None

    def here(self) -> Path:
        """The file, where it is the same on this node; else a copy of it."""
        try:
            if self.path.read_bytes() == self.text:
                return self.path
        except OSError:
            pass
        copy = Path(tempfile.mkdtemp(prefix="plugin-")) / self.path.name
        copy.write_bytes(self.text)
        return copy


def registry_here(files: Iterable[PluginFile]) -> Registry:
    """Ours, what is installed here, and these files."""
    return registry_of([file.here() for file in files])
