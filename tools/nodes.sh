# shellcheck shell=bash
# Sourced by run_train.sh and run_evaluate.sh.
#
# resolve_nodes sets NGPU and NNODES, and with several nodes also NODE_RANK, MASTER_ADDR and MASTER_PORT. It takes them from the
# caller's variables, otherwise from SLURM's, and refuses values that are wrong or incomplete.
# refuse_paths_of CALLER ARGUMENT... ends the script if an argument is a path of the folder in which the caller is, and none of this one.
# start_ranks ARGUMENT... becomes python with these arguments, as the ranks of this node.

resolve_nodes() {
    NGPU=${NGPU:-${SLURM_GPUS_ON_NODE:-1}}
    require_number NGPU 1 || return 1
    if [[ -z ${NNODES:-} ]]; then
        resolve_nodes_of_slurm || return 1
    fi
    require_number NNODES 1 || return 1
    if [[ $NNODES == 1 && ${NODE_RANK:-0} == 0 ]]; then
        return
    fi
    if [[ -z ${NODE_RANK:-} ]]; then
        refuse NODE_RANK "'', with NNODES=$NNODES" "this node's number, 0 to $((NNODES - 1))"
        return 1
    fi
    require_number NODE_RANK 0 $((NNODES - 1)) || return 1
    if ! [[ ${MASTER_ADDR:-} =~ ^[^[:space:]]+$ ]]; then
        refuse MASTER_ADDR "'${MASTER_ADDR:-}', with NNODES=$NNODES" "the name or address of the node whose NODE_RANK is 0"
        return 1
    fi
    MASTER_PORT=${MASTER_PORT:-29500}
    require_number MASTER_PORT 1 65535
}

resolve_nodes_of_slurm() {
    local name
    for name in NODE_RANK MASTER_ADDR MASTER_PORT; do
        # Under SLURM the caller may choose MASTER_ADDR and MASTER_PORT; SLURM gives the rest.
        if [[ -n ${!name:-} && (-z ${SLURM_JOB_ID:-} || $name == NODE_RANK) ]]; then
            refuse NNODES "'', with $name=${!name}" "the number of nodes"
            return 1
        fi
    done
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        NNODES=1
        return
    fi
    NNODES=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}
    if [[ $NNODES == 1 ]]; then
        return
    fi
    if [[ -z ${SLURM_STEP_ID:-} ]]; then
        refuse SLURM_STEP_ID "'', in a job of $NNODES nodes" "a step's: start with srun --ntasks-per-node=1"
        return 1
    fi
    if [[ ${SLURM_STEP_NUM_TASKS:-} != "$NNODES" ]]; then
        refuse SLURM_STEP_NUM_TASKS "'${SLURM_STEP_NUM_TASKS:-}', on $NNODES nodes" "one task per node: srun --ntasks-per-node=1"
        return 1
    fi
    NODE_RANK=${SLURM_NODEID:-}
    if [[ -z ${MASTER_ADDR:-} ]]; then
        MASTER_ADDR=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}" | head -n 1)
    fi
    require_number SLURM_JOB_ID 1 || return 1
    # Below the ports that the system assigns itself, and different for the jobs that may run on a node at the same time.
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
}

require_number() {
    local name=$1 least=$2 most=${3:-999999999}
    if ! [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((${!name} < least || ${!name} > most)); then
        refuse "$name" "'${!name}'" "a whole number from $least${3:+ to $3}"
    fi
}

refuse_paths_of() {
    local caller=$1 argument path
    shift
    for argument in "$@"; do
        path=${argument#--*=}
        if [[ $caller != "$PWD" && $path == *[./]* && $path != /* && -e $caller/$path && ! -e $path ]]; then
            echo "error: relative paths are relative to $PWD, and $path is in $caller: give $caller/$path" >&2
            exit 2
        fi
    done
}

refuse() {
    echo "error: $1 is $2; allowed: $3" >&2
    return 1
}

start_ranks() {
    if ((NNODES == 1 && NGPU == 1)); then
        exec .venv/bin/python "$@"
    fi
    local rendezvous prefix
    if ((NNODES == 1)); then
        rendezvous=(--rdzv-backend=loopback)
        prefix="[rank\${rank}]:"
    else
        # With the static rendezvous node NODE_RANK always gets the ranks from NODE_RANK * NGPU on.
        rendezvous=(--nnodes="$NNODES" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT")
        prefix="[$(hostname) rank\${rank}]:"
    fi
    TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE=$prefix exec .venv/bin/python -m refine_titan launch "${rendezvous[@]}" \
        --nproc-per-node="$NGPU" --local-ranks-filter="${LOG_RANK:-0}" --role=rank --tee=3 "$@"
}
