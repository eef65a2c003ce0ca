# The gateway on any base (--build-arg BASE=...) that has Python 3.9 or newer as `python3`:
#
#   docker build -t llm-gateway .
#   docker run --read-only -p 8080:8080 -e OPENAI_API_KEY \
#       -v "$PWD/config.json:/etc/gateway/config.json:ro" llm-gateway

ARG BASE=python:3-slim
FROM ${BASE}

# python3 -m finds the module in this folder, and nothing in it can be written by the user below.
WORKDIR /opt/gateway
COPY --chmod=444 gateway.py ./

# Bytecode saves each start the compiling, and the memory that compiling leaves behind; it is taken
# without a look at the source's time stamp, which not every builder keeps. The first start, as
# root, writes the bytecode of the standard library, which Python's own images lack, and fails on a
# Python that is too old.
RUN python3 -m compileall -q --invalidation-mode unchecked-hash gateway.py \
    && python3 -m gateway -version

# A number, so that Kubernetes can see that it is not root (runAsNonRoot).
USER 65532:65532

EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=5s \
    CMD ["python3", "-m", "gateway", "-health", "-config", "/etc/gateway/config.json"]

ENTRYPOINT ["python3", "-m", "gateway"]
CMD ["-config", "/etc/gateway/config.json"]
