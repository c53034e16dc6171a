from __future__ import annotations

from typing import Any

import pytest

from tests.stored import contents

from .runs import ended, manifest, start, workplace


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process that nothing happens to stores."""
    place = workplace(tmp_path_factory.mktemp("whole"))
    ended(start(place))
    assert manifest(place)["status"] == "complete"
    found = contents(place / "run")
    assert len(found) > 40
    return found
