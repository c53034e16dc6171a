from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.stored import contents

from .runs import ended, manifest, start, workplace


@pytest.fixture(scope="session")
def whole(once: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, Any]:
    """What one process that nothing happens to stores."""
    place = once("whole", lambda folder: ended(start(workplace(folder))))
    assert manifest(place)["status"] == "complete"
    found = contents(place / "run")
    assert len(found) == 38
    return found
