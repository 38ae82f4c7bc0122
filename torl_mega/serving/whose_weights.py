"""Are the weights that a server holds those of `model.path`? Asked before servers that somebody else started are scored.

A server says the folder it loaded and the version of its weights: SGLang's `default` until somebody sends it others, then what
the sender calls them; a trainer counts its steps, so that 0 is what it started from.
Limit: folders are compared by name where this machine does not see the server's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torl_mega.errors import ServerError
from torl_mega.serving.probe import ask

REMEDY = "start it again with that model, or leave serving.urls out"


async def whose_weights(urls: Sequence[str], model_path: str) -> list[str]:
    """A line for each server. Raises ServerError for one that cannot hold the weights of `model_path`."""
    told = [await ask(url, "/model_info") for url in urls]
    return [
        judged(url, str(info.get("model_path")), str(info.get("weight_version")), model_path)
        for url, info in zip(urls, told, strict=True)
    ]


def judged(url: str, loaded: str, version: str, asked: str) -> str:
    """What to say about a server that loaded `loaded` where `asked` is to be scored. Raises ServerError."""
    if version in ("torn", "asleep"):
        raise ServerError(
            f"{url} holds no whole weights (version {version}), model.path = {asked} is asked for; {REMEDY}"
        )
    if version.isdigit() and int(version) > 0:
        raise ServerError(
            f"{url} holds version {version} of a training run's weights, model.path = {asked} is asked for; {REMEDY}"
        )
    if loaded == asked or (_seen(loaded) and _seen(asked) and os.path.samefile(loaded, asked)):
        return f"{url} holds the weights of {loaded}, version {version}"
    if _seen(loaded) or Path(loaded).name != Path(asked).name:
        raise ServerError(f"{url} holds the weights of {loaded}, model.path = {asked} is asked for; {REMEDY}")
    return f"warning: {url} holds the weights of its own {loaded}, version {version}; taken for those of model.path = {asked}"


def _seen(path: str) -> bool:
    return Path(path).is_dir()
