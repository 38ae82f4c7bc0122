from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from layout_cases import Layout
from layout_worker import config_for

from torl_mega.trainer import parallel


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """This process as the only rank, for a module that names the fixture in its `pytestmark`."""
    config = config_for(Layout(), Path("unused"))
    parallel.init_distributed(config.parallel, config.trainer)
    yield
    parallel.destroy()
