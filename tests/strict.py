"""A pytest plugin for continuous integration: whoever skips a test has not tested it, so a skip is a failure.

``pytest -p tests.strict``

The suite has no test that may be skipped (test_repo.test_nothing_unfinished). What is named here is pytest's word for
a report that this plugin turns into a failure.
"""

from __future__ import annotations

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: {call.excinfo.value if call.excinfo else ''}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} was skipped while it was collected"
    return report
