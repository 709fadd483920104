"""Runs unit tests and integration tests at the same time, one pytest for each: python tests/side_by_side.py [--slow]

Most tests keep one core busy, so on two cores this takes little more than half the time of one pytest. The unit tests' lines appear as
they come, those of the integration tests afterwards. The exit status is 0 if both are, otherwise that of the first that is not.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parent


def main() -> int:
    # Threads that wait for work leave their core to the other pytest.
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    pytest = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    with tempfile.TemporaryFile("w+") as output:
        integration = subprocess.Popen(
            [*pytest, str(TESTS / "integration_tests")], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            unit = subprocess.run([*pytest, str(TESTS / "unit_tests")], env=environment).returncode
            print("unit tests have ended; the integration tests are running", flush=True)
            both = unit or integration.wait()
        except KeyboardInterrupt:  # both have got it too, and report
            both = 130
        integration.wait()
        output.seek(0)
        print(output.read(), flush=True)
    return both


if __name__ == "__main__":
    sys.exit(main())
