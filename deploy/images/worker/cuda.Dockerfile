# The worker's image for NVIDIA GPUs with a driver from 580 on: the CPU's, and beside it onnxruntime with its CUDA provider
# and what that loads of CUDA 13, from PyPI, by digest. The driver itself comes from the machine, by NVIDIA's runtime.
ARG NODE_IMAGE=docker.io/library/node:26-bookworm-slim
ARG PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS cuda
COPY deploy/images/worker/fetch-cuda.sh deploy/images/worker/cuda-requirements.txt /
RUN sh /fetch-cuda.sh /cuda-requirements.txt /opt/cuda

FROM ${NODE_IMAGE} AS runtime
COPY deploy/images/runtime-root.sh /
RUN sh /runtime-root.sh /runtime

FROM ${NODE_IMAGE} AS packages
WORKDIR /app
COPY package.json package-lock.json .npmrc ./
COPY proto/package.json proto/
COPY core/package.json core/
COPY tokenizer/package.json tokenizer/
COPY gateway/package.json gateway/
COPY worker/package.json worker/
COPY controller/package.json controller/
COPY cli/package.json cli/
COPY tests/package.json tests/
COPY deploy/images/install-packages.sh /
RUN sh /install-packages.sh worker proto core

FROM scratch
COPY --from=runtime /runtime /
COPY --from=packages /app /app
COPY --from=cuda /opt/cuda /opt/cuda
COPY proto/src /app/proto/src
COPY core/src /app/core/src
COPY worker/src /app/worker/src
LABEL org.opencontainers.image.title="MiMo Cluster worker, CUDA" \
      org.opencontainers.image.licenses="Apache-2.0" \
      dev.mimo-cluster.sbom="/app/sbom.spdx.json"
ENV NODE_ENV=production PATH=/usr/local/bin \
    LD_LIBRARY_PATH=/opt/cuda \
    MIMO_WORKER_RUNTIME_LIBRARY=/opt/cuda/libonnxruntime.so \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /app
EXPOSE 50052 50152 9464
ENTRYPOINT ["node", "worker/src/main.ts"]
