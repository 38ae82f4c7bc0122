# syntax=docker/dockerfile:1.7
# torl_mega on NVIDIA's PyTorch image: one image for trainer ranks, SGLang servers and sandbox pools.
#
#   docker build --build-arg NGC_DIGEST=sha256:... -t torl_mega .      (the digest makes the build exact; without it the tag decides)
#   enroot import dockerd://torl_mega  ->  TORL_IMAGE=torl_mega.sqsh sbatch launch/torl_7b.slurm
#
# Two environments, because the pins disagree:
#   /opt/torl    the image's own torch, Transformer Engine and apex (built against each other; never reinstalled), plus
#                megatron-core and our libraries: group `gpu` of pyproject.toml
#   /opt/sglang  SGLang, which pins an exact release of torch from the package index, its kernels and its transformers:
#                group `sglang-gpu`, plus our own libraries, because torl_mega.serving.serve runs there
# What they must share is NCCL, because weights travel over one communicator through both: the build ends with the line that
# says what differs when another NGC_TAG does not fit the pins of pyproject.toml.
ARG NGC_TAG=26.07-py3
ARG NGC_DIGEST=
FROM nvcr.io/nvidia/pytorch:${NGC_TAG}${NGC_DIGEST:+@${NGC_DIGEST}} AS base
ARG NGC_TAG
ARG NGC_DIGEST
# the image's own constraint file would fight our pins; its torch stays, because nothing below asks for another
ENV PIP_CONSTRAINT= \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# ------------------------------------------------------------------------------------------------ environments
FROM base AS trainer
ARG NGC_TAG
WORKDIR /src
COPY pyproject.toml ./
RUN python -m venv --system-site-packages /opt/torl \
 && /opt/torl/bin/python -m pip install --upgrade "pip>=25.1" "setuptools>=77" wheel \
 && /opt/torl/bin/python -c "import torch; print(torch.__version__)" > /tmp/torch \
 && /opt/torl/bin/python -m pip install --group gpu \
 && /opt/torl/bin/python -c "import torch; print(torch.__version__)" | cmp - /tmp/torch \
 && /opt/torl/bin/python -c "import transformer_engine.pytorch, apex, megatron.core" \
 || { echo "error: group gpu of pyproject.toml does not fit ${NGC_TAG}, see the line above" >&2; exit 1; }

FROM base AS sglang
WORKDIR /src
COPY pyproject.toml ./
RUN python -m venv /opt/sglang \
 && /opt/sglang/bin/python -m pip install --upgrade "pip>=25.1" "setuptools>=77" wheel \
 && /opt/sglang/bin/python -m pip install --group sglang-gpu \
 && /opt/sglang/bin/python -m pip check \
 || { echo "error: group sglang-gpu of pyproject.toml cannot be installed on this Python, see the line above" >&2; exit 1; }

# ------------------------------------------------------------------------------------------------------- image
FROM base
ARG NGC_TAG
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="torl_mega" \
      org.opencontainers.image.description="Tool-integrated RL at cluster scale: Megatron-Core trains, SGLang samples, a sandbox runs the code" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/pytorch:${NGC_TAG}"

COPY --from=trainer /opt/torl /opt/torl
COPY --from=sglang /opt/sglang /opt/sglang
COPY pyproject.toml README.md /opt/torl_mega/
COPY torl_mega /opt/torl_mega/torl_mega
COPY conf /opt/torl_mega/conf
COPY launch /opt/torl_mega/launch
COPY tools /opt/torl_mega/tools
RUN /opt/torl/bin/python -m pip install --no-deps --no-build-isolation --editable /opt/torl_mega \
 && /opt/sglang/bin/python -m pip install --no-deps --no-build-isolation --editable /opt/torl_mega \
 && /opt/torl/bin/python -m torl_mega.launch.environments /opt/torl/bin/python /opt/sglang/bin/python

# Not root: the sandbox then runs in tier A where the host allows user namespaces, else in tier B by Landlock.
ARG UID=1000
RUN getent passwd "${UID}" >/dev/null || useradd --create-home --uid "${UID}" torl; \
    install -d -o "${UID}" /workspace/runs
USER ${UID}
WORKDIR /opt/torl_mega
ENV PATH=/opt/torl/bin:${PATH} \
    TORL_SGLANG_PYTHON=/opt/sglang/bin/python \
    HOME=/tmp

HEALTHCHECK --interval=60s --timeout=30s --start-period=30s --retries=3 CMD ["torl", "doctor", "--json"]
ENTRYPOINT ["torl"]
CMD ["--help"]
