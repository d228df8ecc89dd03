"""How the tests are spread over worker processes, and what the end of their log says.

`make test` runs two workers, and each file in one of them. The tests of a real server share one worker, and with it
their servers; the other one computes meanwhile.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
ORDER = ("server", "chaos", "kernels", "gpu", "model", "cases", "unit")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.relative_to(HERE).parts[0]))
    for item in items:
        path = item.path.relative_to(HERE)
        group = "server" if path.parts[0] == "server" else str(path)
        if path.name == "test_sanitizers.py":
            group = item.name  # a minute each
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = dict.fromkeys(
        value
        for report in terminalreporter.stats.get("passed", ())
        for name, value in report.user_properties
        if name == "native kernels"
    )
    if ran:
        terminalreporter.write_line(f"native kernels ran for: {', '.join(ran)}")
