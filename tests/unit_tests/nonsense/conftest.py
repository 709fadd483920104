"""Says how many inputs the property tests have tried."""

from tests.unit_tests.nonsense.judge import tried


def pytest_terminal_summary(terminalreporter):
    if tried:
        terminalreporter.section("inputs tried")
        for kind in sorted({kind for kind, _ in tried}):
            terminalreporter.write_line(f"{kind:<22} {tried[kind, 'works']:>6} work, {tried[kind, 'refused']:>6} refused in one line")
        terminalreporter.write_line(f"{tried.total():,} in all")
