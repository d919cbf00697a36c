"""
A plugin of pytest that writes each outcome to a file at once: a run that is cut off leaves what it found.

`pytest -p tests.gpu.outcomes --outcomes FILE` writes a line of JSON with the names of the chosen tests, then one for
each test that has ended, and when it did.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

NOT_TRIED = "not tried"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="the file of JSON lines to write")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Writer(config.getoption("--outcomes")))


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, row: dict[str, Any]) -> None:
        row = {**row, "ended_at": time.time()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._write({"chosen": [_name(item.nodeid) for item in session.items]})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:  # a file that can't be imported
            row = {"name": _name(report.nodeid), "outcome": "failed", "seconds": 0, "figures": {}, "why": _why(report)}
            self._write(row)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:  # a set-up that is skipped, and a clean-up that fails
            self._write(
                {
                    "name": _name(report.nodeid),
                    "outcome": _outcome(report),
                    "seconds": round(report.duration, 1),
                    "figures": dict(report.user_properties),
                    "why": _why(report),
                }
            )


def _name(nodeid: str) -> str:
    return nodeid.rpartition("/")[2].removeprefix("test_").replace(".py::test_", ": ").replace("_", " ")


def _outcome(report: pytest.TestReport) -> str:
    if report.skipped:
        return NOT_TRIED if NOT_TRIED in _why(report) else "skipped"
    return str(report.outcome)


def _why(report: pytest.TestReport | pytest.CollectReport) -> str:
    if report.passed:
        return ""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash is not None else report.longrepr)[:2000]
