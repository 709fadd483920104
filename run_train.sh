#!/usr/bin/env bash
# Trains. The first use sets up .venv in this folder; later uses start at once.
#
#   ./run_train.sh                                             # debug mid-training, about three minutes on two CPU cores
#   ./run_train.sh --dry-run                                   # checks everything and describes the run
#   CONFIG_FILE=my.toml NGPU=8 ./run_train.sh --training.steps 20
#
# Relative paths in settings are relative to this folder; CONFIG_FILE may be relative to the caller's.
# NGPU: processes (GPUs) on this machine, 1 by default. Any --section.key overrides the TOML file.
set -euo pipefail
# A relative CONFIG_FILE is one of the caller's folder, or else of this repository.
if [[ -n ${CONFIG_FILE:-} && -f $CONFIG_FILE ]]; then
    CONFIG_FILE=$(realpath "$CONFIG_FILE")
fi
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/setup_environment.sh

CONFIG_FILE=${CONFIG_FILE:-train_configs/debug_midtrain.toml}
NGPU=${NGPU:-1}
if ! [[ $NGPU =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NGPU is '$NGPU'; allowed: a whole number from 1" >&2
    exit 1
fi

setup_environment
arguments=(-m refine_titan.train --job.config_file "$CONFIG_FILE" "$@")
if [[ $NGPU == 1 ]]; then
    exec .venv/bin/python "${arguments[@]}"
fi
for argument in "$@"; do
    if [[ $argument == --dry-run || $argument == --help || $argument == -h ]]; then
        exec .venv/bin/python "${arguments[@]}"
    fi
done
# torchrun would bury a wrong setting under every process's traceback: check before it starts.
.venv/bin/python "${arguments[@]}" --dry-run >/dev/null
exec .venv/bin/python -m torch.distributed.run --nproc_per_node="$NGPU" --rdzv_backend=c10d --rdzv_endpoint=localhost:0 \
    --local-ranks-filter="${LOG_RANK:-0}" --role=rank --tee=3 "${arguments[@]}"
