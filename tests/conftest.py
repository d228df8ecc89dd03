"""How the tests are spread over worker processes, and what the end of their log says.

`make test` and `make test-slow` run two workers (WORKERS=3: three, a tenth faster where the cores are fast), and each
file in one of them: one computes while those of real servers, which mostly wait, share the other. The tests of the
shared server are one group, and so in one worker.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ORDER = ("server", "chaos", "kernels", "gpu", "model", "cases", "unit")


def pytest_configure() -> None:
    # In the background of a script processes ignore Ctrl-C, and so would the servers that tests send it to.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _uses_shared_server(item: pytest.Item) -> bool:
    """Whether it asks for the server of tests/server, and its module has none of its own."""
    is_shared = item.path.is_relative_to(HERE / "server") and not hasattr(getattr(item, "module", None), "server")
    return is_shared and "server" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)  # before xdist writes the groups into the names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.relative_to(HERE).parts[0]))
    for item in items:
        path = item.path.relative_to(HERE)
        group = "server" if _uses_shared_server(item) else str(path)
        if path.name == "test_sanitizers.py":
            group = item.name  # a minute each
        elif path.parts[-2:] == ("chaos", "test_chaos.py"):
            group = str(Path("server", "test_loadtest.py"))  # which measures: not while that breaks things beside it
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    """A pytest that xdist does not know may drop the groups without a word: each worker would start every server."""
    grouped = getattr(session.config.option, "loadgroup", False)
    if grouped and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("xdist does not group the tests: this pytest is newer than it knows")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ran = dict.fromkeys(
        value
        for report in terminalreporter.stats.get("passed", ())
        for name, value in report.user_properties
        if name == "native kernels"
    )
    if ran:
        terminalreporter.write_line(f"native kernels ran for: {', '.join(ran)}")
