# One image for training on NVIDIA GPUs. Recipes, data and runs are mounted, so that they outlive the container:
#   docker build --build-arg VERSION=0.1.0 -t prx-composer .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" prx-composer composer -m prx_composer.cli train yamls/24h.yaml
# --ipc=host: loaders hand batches over in shared memory, of which a container has 64 MB otherwise.
# torch brings CUDA's libraries; the base has what finds the driver. Python's headers and gcc are for Triton's kernels.
FROM nvidia/cuda:12.6.3-base-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc git libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=ghcr.io/astral-sh/uv:0.9.0 /uv /usr/local/bin/uv

WORKDIR /opt/prx-composer
ENV UV_CACHE_DIR=/var/cache/uv UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_COMPILE_BYTECODE=1
ARG EXTRAS="--extra data --extra eval --extra float8 --extra lora --extra trackers"
# The packages, in a layer that stays while only our code changes.
COPY pyproject.toml README.md ./
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/var/cache/uv uv sync --no-default-groups --no-install-project $EXTRAS

COPY . .
ARG VERSION=0.0
# hadolint ignore=SC2086
RUN --mount=type=cache,target=/var/cache/uv \
    SETUPTOOLS_SCM_PRETEND_VERSION_FOR_PRX_COMPOSER="$VERSION" uv sync --no-default-groups $EXTRAS

ENV PATH="/opt/prx-composer/.venv/bin:$PATH"
WORKDIR /work
CMD ["prx", "recipes"]
