# One shard, on a CPU or a GPU. Build from the repository's root:
#   docker build -f deploy/images/shard.Dockerfile -t stitch-shard .
FROM python:3.11-slim

# The package index of another build of torch: PyTorch publishes one for CPUs and one for each version of CUDA. For
# x86-64 pip's default index has the build with CUDA.
ARG TORCH_INDEX=""

WORKDIR /app
COPY requirements.lock pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' requirements.lock)"
COPY stitch stitch
COPY stitch_server stitch_server
COPY router_gateway router_gateway
RUN pip install --no-cache-dir --constraint requirements.lock '.[shard,otel]' \
    && useradd --system --uid 999 --create-home stitch \
    && install --directory --owner stitch /var/lib/stitch
COPY deploy/*.toml deploy/

ENV STITCH_CACHE=/var/lib/stitch
VOLUME /var/lib/stitch
USER stitch
STOPSIGNAL SIGTERM
ENTRYPOINT ["stitch-server"]
