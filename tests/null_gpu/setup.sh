# shellcheck shell=bash
# Sourced by run_tests.sh --null-gpu from the repository's root.
#
# setup_null_gpu makes an environment with the CUDA builds (.venv_null_gpu, or the folder NULL_GPU_ENVIRONMENT; 9 GB, some minutes),
# builds the libraries of the GPU that does nothing in it, and exports what processes need to run on it, but for LD_PRELOAD.

source tools/setup_environment.sh

setup_null_gpu() {
    export NULL_GPU_ENVIRONMENT=${NULL_GPU_ENVIRONMENT:-$PWD/.venv_null_gpu}
    local python=$NULL_GPU_ENVIRONMENT/bin/python folder=$NULL_GPU_ENVIRONMENT/null_gpu state
    state=$(wanted_state gpu)
    if [[ ! -f $NULL_GPU_ENVIRONMENT/.installed || $(<"$NULL_GPU_ENVIRONMENT/.installed") != "$state" ]]; then
        if [[ ! -x $python ]]; then
            "${PYTHON:-python3}" -m venv "$NULL_GPU_ENVIRONMENT" || return 1
        fi
        # pip prefers a local build (+cpu) to the registry's CUDA build wherever its configuration names one.
        PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS='' PIP_EXTRA_INDEX_URL='' install_project "$python" gpu float8 dev || return 1
        echo "$state" >"$NULL_GPU_ENVIRONMENT/.installed"
    fi
    "$python" tests/null_gpu/build.py "$folder" || return 1
    export NULL_GPU_LIBRARY=$folder/libcuda.so.1 LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export TRITON_LIBCUDA_PATH=$folder VLLM_NCCL_SO_PATH=$NULL_GPU_LIBRARY
    # Kernels are compiled for minutes the first time.
    export TRITON_CACHE_DIR=$NULL_GPU_ENVIRONMENT/triton TORCHINDUCTOR_CACHE_DIR=$NULL_GPU_ENVIRONMENT/inductor
}
