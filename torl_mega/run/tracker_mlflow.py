"""MLflow through its own client. Contract: implements `Tracker`; one process at a time tells one run."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torl_mega.config import MlflowConfig

MAX_PARAM_CHARS, PARAMS_A_CALL = 500, 100  # limits of older servers
# a server that is away must not hold a step for minutes, as the library's own limits would
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def open_mlflow(
    config: MlflowConfig, folder: Path, name: str, settings: Mapping[str, str | float | bool], run_id: str | None
) -> tuple[Mlflow, str]:
    """The run, begun or, with the id of an earlier process, gone on with."""
    for variable, value in PATIENCE.items():
        os.environ.setdefault(variable, value)
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or str(folder.parent / "mlruns")
    if "://" not in uri:
        uri = Path(uri.removeprefix("file:")).resolve().as_uri()
    if uri.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder was asked for
    from mlflow import MlflowClient
    from mlflow.entities import Param

    client = MlflowClient(uri)
    if run_id is not None:
        client.update_run(run_id, status="RUNNING")
        return Mlflow(client, run_id), run_id
    found = client.get_experiment_by_name(config.experiment)
    experiment = found.experiment_id if found else client.create_experiment(config.experiment)
    run = client.create_run(experiment, run_name=name)
    params = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in settings.items()]
    for first in range(0, len(params), PARAMS_A_CALL):
        client.log_batch(run.info.run_id, params=params[first : first + PARAMS_A_CALL])
    return Mlflow(client, run.info.run_id), run.info.run_id


class Mlflow:
    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._id = run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        at = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(_name(n), v, at, step) for n, v in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"samples/step_{step:05d}/{_name(name)}.txt")

    def close(self, *, complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")


def _name(name: str) -> str:
    """With only what MLflow allows in names."""
    return re.sub(r"[^\w\-. :/]", "_", name)
