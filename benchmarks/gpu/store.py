"""The results: one JSON file for a GPU model, rewritten whole (temporary file, then rename) after each measurement."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path


class StoreError(ValueError):
    """A results file that cannot be used; the message says which and why."""


def slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def fingerprint(root: Path, patterns: Iterable[str]) -> str:
    """Identifies sources by content: machines may get the tree without its history."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()}):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


class Store:
    """The entries of one machine by key; a newer entry replaces an older one of the same key.

    Attributes:
        path: the file.
        header: everything but the entries: suite, machine, versions, date.
    """

    def __init__(self, path: Path, header: dict, start_from: Path | None = None) -> None:
        """Reads `path`, or where it is missing `start_from`, the results of an earlier session."""
        self.path, self.header = path, header
        self._entries: dict[str, dict] = {}
        for source in (path, start_from):
            if source is not None and source.exists():
                self._entries = {entry["key"]: entry for entry in _read(source)}
                break

    def entries(self) -> list[dict]:
        return list(self._entries.values())

    def get(self, key: str) -> dict | None:
        return self._entries.get(key)

    def done(self, key: str, code: str, retry: bool = False) -> bool:
        """True where the key was measured with this code; failures count as done unless they are to be retried."""
        entry = self._entries.get(key)
        if entry is None or entry["code"] != code or entry.get("incomplete"):
            return False
        return not (retry and "error" in entry)

    def add(self, entry: dict) -> None:
        """Add the entry (it has "key" and "code") and write the file."""
        self._entries.pop(entry["key"], None)
        self._entries[entry["key"]] = entry
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self._text())
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _text(self) -> str:
        """One line for an entry, so that a diff shows what changed."""
        head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in self.header.items()]
        rows = ",\n  ".join(json.dumps(entry) for entry in self._entries.values())
        return "{\n" + ",\n".join([*head, f' "entries": [\n  {rows}\n ]']) + "\n}\n"


def _read(path: Path) -> list[dict]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["suite"] != "gpu":
            raise KeyError("suite is not gpu")
        return [entry for entry in content["entries"] if entry["key"] and entry["code"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path}: not a results file of `make gpu` ({type(error).__name__}: {error}); "
            "move it away, or give another --out"
        ) from error
