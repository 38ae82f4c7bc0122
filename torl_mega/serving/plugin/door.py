"""SGLang asks for the run's secret, TORL_SECRET: as its API key and its admin API key.

Given as --api-key, or in a --config file, it would stand in the process list or in the line `server_args=…` of SGLang's log.
So it is set when that line has been written (entrypoints/engine.py:1185 of 0.5.23) and before the keys are read
(entrypoints/http_server.py:2888). Health, readiness and metrics stay open, as SGLang has it. SGLang's own refusals of what
has no such door (http_server.py:259, arg_groups/serving_hook.py:428) are over by then, so they are made again here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def with_keys(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.runtime_context import get_context, get_serving

    if secret := os.environ.get("TORL_SECRET"):
        serving = get_serving()
        if serving.tokenizer_worker_num > 1 or serving.grpc_port is not None:
            raise ValueError(
                "TORL_SECRET is set, and --tokenizer-worker-num > 1 or --grpc-port would let in who does not show it; take "
                "them out of serving.extra_args"
            )
        get_context().override("TORL_SECRET", api_key=secret, admin_api_key=secret)
    return original(*args, **kwargs)
