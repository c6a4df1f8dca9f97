# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
A folder of things that take a while to make, each made once.

An entry is written to a scratch folder beside its final place and renamed when it is complete. Renaming a folder is atomic,
so what was killed half-way is never seen, and of two processes that make the same entry one wins and both go on with it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """The cache's folder: `$TRL_SPO_CACHE`, or `~/.cache/trl_spo`."""
    return Path(os.environ.get("TRL_SPO_CACHE") or Path.home() / ".cache" / "trl_spo").expanduser()


def cached(name: str, settings: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """
    The folder of an entry; made first if it is not there.

    Args:
        name (`str`):
            What it is, for people who look into the cache.
        settings (`dict`):
            All that determines the content, JSON-serializable. A change of any makes another entry.
        make (`Callable`):
            Writes the content into the folder that it is given.

    Returns:
        [`~pathlib.Path`]: the folder; read-only by agreement.
    """
    text = json.dumps(settings, sort_keys=True)
    folder = cache_dir() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(scratch)
        (scratch / "settings.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        scratch.chmod(0o755)  # mkdtemp makes it readable by its owner only
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            # Another process was faster
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
