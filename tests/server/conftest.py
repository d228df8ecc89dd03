"""Everything below tests/server starts a real tritonserver; without one the tests are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashserve.launcher.discover import find_triton
from shared_servers import server  # noqa: F401 - a fixture for every test below this folder

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    install = find_triton()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.server)
            if install is None or install.stub is None:
                item.add_marker(pytest.mark.skip(reason="no tritonserver for this Python: pip install nvidia-pytriton"))
