#!/usr/bin/env bash
# Trains a model. The first use sets up .venv in this folder; later uses start at once.
#
#   ./run_train.sh                                             # debug mid-training, about three minutes on two CPU cores
#   ./run_train.sh --dry-run                                   # checks everything and describes the run
#   NGPU=8 ./run_train.sh my.toml --training.steps 20          # the same as CONFIG_FILE=my.toml NGPU=8 ./run_train.sh ...
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 ./run_train.sh      # and on the other node with NODE_RANK=1
#   sbatch tools/slurm/train.sbatch                            # under SLURM
#
# Relative paths in settings are relative to this folder; the config file may be relative to the caller's folder.
# NGPU: number of processes (GPUs) on this machine; by default 1, under SLURM the node's GPUs. Any --section.key overrides the TOML file.
# Several nodes, signals and exit statuses: docs/multi_node.md.
set -euo pipefail
if (($#)) && [[ $1 != -* ]]; then
    CONFIG_FILE=$1
    shift
fi
# A relative config file is looked up in the caller's folder, then in this repository.
if [[ -n ${CONFIG_FILE:-} && -f $CONFIG_FILE ]]; then
    CONFIG_FILE=$(realpath "$CONFIG_FILE")
fi
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/nodes.sh
source tools/setup_environment.sh
# A request to stop that comes before anything has started gives the status for it, as in refine_titan/distributed/stop_request.py.
trap 'exit 75' TERM USR1

CONFIG_FILE=${CONFIG_FILE:-train_configs/debug_midtrain.toml}
refuse_paths_of "$caller" "$@"
resolve_nodes
arguments=(-m refine_titan train --job.config_file "$CONFIG_FILE" "$@")

for argument in "$@"; do
    if [[ $argument == --dry-run || $argument == --help* || $argument == -h ]]; then
        if [[ ${SLURM_NODEID:-0} != 0 ]]; then
            exit 0 # only the first node of the step does it
        fi
        setup_environment
        WORLD_SIZE=$((NGPU * NNODES)) exec .venv/bin/python "${arguments[@]}"
    fi
done

if ((${NODE_RANK:-0} == 0)); then
    setup_environment
else
    await_environment
fi
if ((NGPU * NNODES > 1 && ${NODE_RANK:-0} == 0)); then
    # Check everything once here, instead of in every rank.
    WORLD_SIZE=$((NGPU * NNODES)) .venv/bin/python "${arguments[@]}" --dry-run >/dev/null
fi
if [[ -t 2 ]]; then
    echo "Loading PyTorch ..." >&2 # seconds, in which nothing else appears
fi
start_ranks "${arguments[@]}"
