#!/usr/bin/env bash
# Runs the tests; the first use sets up .venv in this folder.
#
#   ./run_tests.sh             # everything but the slow tests
#   ./run_tests.sh --slow      # everything
#   ./run_tests.sh -k packing  # any option of pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/setup_environment.sh
setup_environment dev
exec .venv/bin/python -m pytest "$@"
