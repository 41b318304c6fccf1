# Corral on llama.cpp's image for NVIDIA GPUs (CUDA):   docker build -t corral .
# Dockerfile.cpu is the same but for these lines, BASE, and NGL and CTX; a test holds the two together.
ARG BASE=ghcr.io/ggml-org/llama.cpp:server-cuda

# Python (3.11 or newer; Ubuntu 24.04 brings 3.12) and an init, beside the base's llama-server.
FROM ${BASE} AS python
USER root
RUN export DEBIAN_FRONTEND=noninteractive \
    && apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 tini \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log /var/log/alternatives.log \
    && echo 'corral:x:10001:' >>/etc/group \
    && echo 'corral:x:10001:10001:Corral:/tmp:/usr/sbin/nologin' >>/etc/passwd \
    && install -d -m 1777 /data \
    && ln -s /opt/corral/entrypoint.sh /usr/local/bin/corral
WORKDIR /opt/corral

# Apart, so that pip, its cache and a compiler stay behind. Where the index has no wheel for this Python and processor:
#   docker build --build-arg BUILD_PACKAGES="build-essential python3-dev" …
FROM python AS wheels
ARG BUILD_PACKAGES=""
RUN export DEBIAN_FRONTEND=noninteractive \
    && apt-get update \
    && apt-get install -y --no-install-recommends binutils python3-venv ${BUILD_PACKAGES}
# `runpod` brings the SDK that WORKER_MODE=runpod needs.
ARG EXTRAS=""
COPY requirements.lock requirements-runpod.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv .venv \
    && .venv/bin/pip --disable-pip-version-check install --no-compile --require-hashes \
        -r requirements${EXTRAS:+-$EXTRAS}.lock \
    && .venv/bin/pip uninstall --quiet --yes setuptools pip \
    && find .venv/bin -type f -delete \
    && find .venv -name '*.so' -exec strip --strip-unneeded {} + \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash .venv/lib

# Compiled here, because a read-only container could not keep what it compiles.
FROM python AS code
COPY entrypoint.sh LICENSE ./
COPY health health
COPY gateway gateway
RUN chmod -R u=rwX,go=rX . \
    && chmod 755 entrypoint.sh \
    && python3 -m compileall -q --invalidation-mode unchecked-hash gateway health

FROM python
COPY --from=wheels /opt/corral/.venv .venv
COPY --from=code /opt/corral .
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1
# Anyone may write to /data, so that any --user can; a volume or a bind mount brings its own rights.
VOLUME /data
EXPOSE 8000 8001
USER 10001:10001
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 CMD ["/opt/corral/entrypoint.sh", "healthcheck"]
ENTRYPOINT ["/usr/bin/tini", "-s", "--", "/opt/corral/entrypoint.sh"]
# Last, as they change with each build. All that the base sets is set here, or it would speak of llama.cpp.
ARG BASE
ARG VERSION=0.1.0
ARG REVISION=""
ARG CREATED=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="Corral" \
      org.opencontainers.image.description="A trustworthy front for llama.cpp's llama-server" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.url="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE}"
