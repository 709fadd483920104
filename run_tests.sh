#!/usr/bin/env bash
# Runs the tests; the first use sets up .venv in this folder.
#
#   ./run_tests.sh             # everything but the slow tests
#   ./run_tests.sh --slow      # everything
#   ./run_tests.sh -k packing  # any option of pytest
#   ./run_tests.sh --null-gpu  # whole jobs by the CUDA builds on a GPU that does nothing (tests/null_gpu); no other tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ ${1:-} == --null-gpu ]]; then
    source tests/null_gpu/setup.sh
    setup_null_gpu
    exec "$NULL_GPU_ENVIRONMENT/bin/python" -m pytest tests/null_gpu "${@:2}"
fi
source tools/setup_environment.sh
setup_environment dev
if [[ -z $* || $* == --slow ]]; then
    exec .venv/bin/python tests/side_by_side.py "$@"
fi
exec .venv/bin/python -m pytest "$@"
