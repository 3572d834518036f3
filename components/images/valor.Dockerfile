# The image of every task on a cluster (docs/running.md, "On a cluster"). Build it from the repository's root:
#   docker build -f components/images/valor.Dockerfile --build-arg VALOR_COMMIT="$(git rev-parse HEAD)" -t REGISTRY/valor:0.1.0 .
FROM python:3.11-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Another build of torch: --build-arg TORCH=torch==2.13.0+cpu --build-arg PIP_ARGS="--extra-index-url INDEX_OF_CPU_BUILDS"
ARG TORCH=torch==2.13.0
ARG PIP_ARGS=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

RUN useradd --create-home --uid 10001 valor

# The layers that change least come first: torch is several gigabytes.
WORKDIR /opt/valor
COPY constraints.txt ./
# hadolint ignore=SC2086
RUN python -m pip install -c constraints.txt ${PIP_ARGS} "${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY valor ./valor
COPY components ./components
COPY pipelines ./pipelines
# hadolint ignore=SC2086
RUN python -m pip install -c constraints.txt ${PIP_ARGS} ".[train,gcp]"

# There is no git in the image: this is how runs and stamps know the commit.
ARG VALOR_COMMIT=""
ENV VALOR_COMMIT=${VALOR_COMMIT}
LABEL org.opencontainers.image.title="valor" \
      org.opencontainers.image.description="The stages of VALOR's pipeline" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${VALOR_COMMIT}"

USER valor
WORKDIR /home/valor
CMD ["valor", "--help"]
