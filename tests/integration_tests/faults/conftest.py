"""One machine for all tests of faults, and the table of what they found."""

import pytest

from tests.integration_tests.faults.machine import Machine
from tests.integration_tests.faults.matrix import table


@pytest.fixture(scope="session")
def machine(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("machine"))
    yield machine
    machine.close()


def pytest_terminal_summary(terminalreporter):
    found = table()
    if found:
        terminalreporter.section("places and faults")
        terminalreporter.write_line(found)
