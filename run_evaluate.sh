#!/usr/bin/env bash
# Evaluates a checkpoint; the ranks share the samples. The arguments are those of refine-titan evaluate run.
#
#   ./run_evaluate.sh my.toml --checkpoint DIR --tasks niah longbench
#   NGPU=8 ./run_evaluate.sh my.toml --checkpoint DIR --tasks niah longbench
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 NGPU=8 ./run_evaluate.sh my.toml ...     # and on the other node with NODE_RANK=1
#   SCRIPT=run_evaluate.sh sbatch tools/slurm/train.sbatch my.toml ...              # under SLURM
#
# Relative paths are relative to this folder; the config may be relative to the caller's folder. Variables, signals and exit statuses
# are those of run_train.sh: docs/multi_node.md.
set -euo pipefail
if [[ -f ${1:-} ]]; then
    set -- "$(realpath "$1")" "${@:2}"
fi
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/nodes.sh
source tools/setup_environment.sh
# A request to stop that comes before anything has started gives the status for it, as in refine_titan/distributed/stop_request.py.
trap 'exit 75' TERM USR1

refuse_paths_of "$caller" "$@"
resolve_nodes
if ((${NODE_RANK:-0} == 0)); then
    setup_environment
else
    await_environment
fi
start_ranks -m refine_titan evaluate run "$@"
