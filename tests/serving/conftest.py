from __future__ import annotations

from pathlib import Path

import pytest
from reference import Reference


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)
