"""On a CPU, SGLang's scheduler and detokenizer are forked from its HTTP process, which has imported all that they need.

SGLang spawns them, because CUDA does not survive a fork; each then imports torch, transformers and SGLang once more, and
only when both have is a server ready. Forked, they begin at once and share the pages of those imports. A fork copies one
thread only, so it is taken while there is one; else SGLang's own way is.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from typing import Any


def forked(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND hook on the methods of `Engine` that start processes (SGLang srt/entrypoints/engine.py)."""
    before = multiprocessing.get_start_method()
    if len(os.listdir("/proc/self/task")) == 1:
        gc.freeze()  # a collection would write to, and so copy, every page that holds an object
        multiprocessing.set_start_method("fork", force=True)
    try:
        return original(*args, **kwargs)
    finally:
        multiprocessing.set_start_method(before, force=True)


def no_freeze(*_args: Any, **_kwargs: Any) -> None:
    """REPLACE hook on `_freeze_gc_after_server_warmup` (srt/entrypoints/http_server.py), which asks the server over HTTP
    for what `forked` has done; without a warm-up it asks before the server listens."""
