# Two images: `cpu`, the default, and `cuda`.
#   docker build --build-arg TORCH_INDEX=URL -t loraplex:0.1.0 .        URL: an index with torch's CPU builds
#   docker build --target cuda -t loraplex:0.1.0-cuda .
# Without TORCH_INDEX torch comes from PyPI, with CUDA's libraries: right for `cuda`, some gigabytes too many for `cpu`.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /build
COPY deploy/docker/steps.sh deploy/docker/
RUN deploy/docker/steps.sh packages g++
ARG TORCH_INDEX=
COPY constraints.txt ./
RUN deploy/docker/steps.sh torch /opt/loraplex
COPY pyproject.toml setup.py README.md LICENSE ./
COPY server/ server/
COPY kernels/ kernels/
COPY adapters/ adapters/
COPY benchmarks/ benchmarks/
RUN deploy/docker/steps.sh package /opt/loraplex \
    && deploy/docker/steps.sh demo /opt/loraplex /opt/loraplex/demo \
    && deploy/docker/steps.sh slim /opt/loraplex
COPY deploy/docker/healthcheck.py /opt/loraplex/

FROM ${PYTHON_IMAGE} AS runtime
# The kernels' threads are OpenMP's.
RUN --mount=type=bind,source=deploy/docker,target=/deploy \
    /deploy/steps.sh packages libgomp1 && /deploy/steps.sh user 10001 /state
COPY --from=build /opt/loraplex /opt/loraplex
# Downloads and compiled GPU kernels go below HOME: only /state and /tmp need to be writable.
ENV PATH=/opt/loraplex/bin:$PATH \
    LORAPLEX_DEMO=/opt/loraplex/demo \
    HOME=/state \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /state
USER 10001:10001
VOLUME /state
EXPOSE 8000
# Another --port: set LORAPLEX_HEALTH_URL, too.
HEALTHCHECK --interval=5s --timeout=4s --start-period=5m --retries=3 \
    CMD ["python", "/opt/loraplex/healthcheck.py"]
# No init: the server handles SIGTERM as process 1 and starts no processes of its own.
ENTRYPOINT ["loraplex"]
CMD ["serve", "demo", "--host", "0.0.0.0", "--port", "8000", "--no-auth"]

FROM runtime AS cuda
USER 0
# Triton compiles the launchers of its kernels when they first run.
RUN --mount=type=bind,source=deploy/docker,target=/deploy /deploy/steps.sh packages gcc libc6-dev
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

FROM runtime AS cpu
