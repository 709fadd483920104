# refine_titan with its locked packages, for a CPU or for GPUs (CUDA comes with the packages, the driver from the host):
#
#   docker build -t refine_titan .                                   # BUILD=cpu
#   docker build -t refine_titan:gpu --build-arg BUILD=gpu .
#   docker run --rm -v "$PWD/outputs:/refine_titan/outputs" refine_titan train train_configs/debug_midtrain.toml
#   docker run --rm --gpus all --ipc host refine_titan:gpu train my.toml
#
# Not tried with Docker: only its commands and the form of this file have been checked.
FROM python:3.11-slim

ARG BUILD=cpu
# Triton and torch's compiler need a compiler and its headers when a run starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /refine_titan
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Packages first: a change of the code does not install them again.
COPY pyproject.toml README.md LICENSE ./
COPY locks locks
COPY tools/setup_environment.sh tools/lock_dependencies.py tools/
RUN python -m venv .venv \
    && source tools/setup_environment.sh \
    && PIP_NO_CACHE_DIR=1 install_locked .venv/bin/python "$BUILD"
COPY . .
RUN source tools/setup_environment.sh \
    && PIP_NO_CACHE_DIR=1 install_project .venv/bin/python "$BUILD" \
    && wanted_state "$BUILD" >"$STAMP"

ENV PATH=/refine_titan/.venv/bin:$PATH
ENTRYPOINT ["refine-titan"]
CMD ["--help"]
