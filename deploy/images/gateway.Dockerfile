# The gateway and the `stitch` client: no torch. Build from the repository's root:
#   docker build -f deploy/images/gateway.Dockerfile -t stitch-gateway .
FROM python:3.11-slim

WORKDIR /app
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY stitch stitch
COPY stitch_server stitch_server
COPY router_gateway router_gateway
RUN pip install --no-cache-dir --constraint requirements.lock '.[gateway,cli,otel]' \
    && useradd --system --uid 999 --create-home stitch
COPY deploy/*.toml deploy/

USER stitch
STOPSIGNAL SIGTERM
ENTRYPOINT ["router-gateway"]
