"""A pytest plugin: what failed is told when it fails, and not at the end alone, which a session out of time never sees.

python -m pytest -p failures_at_once ...
"""

import pytest


class FailuresAtOnce:
    def __init__(self, config: pytest.Config):
        self._terminal = config.pluginmanager.get_plugin("terminalreporter")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self._terminal is not None:
            self._terminal.write_line(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}")


@pytest.hookimpl(trylast=True)  # the terminal's own reporter is there then
def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(FailuresAtOnce(config))
