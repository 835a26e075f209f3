# One image for every service of docker-compose.yml: the same pinned packages as in .venv.
#     docker build -t gptloom .
FROM python:3.11-slim

# Triton compiles its launchers with a C compiler when a GPU worker uses torch.compile.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 gptloom \
    && install -d -m 700 -o gptloom -g gptloom /data

WORKDIR /app
# The packages first: this layer is rebuilt only when they change.
COPY pyproject.toml constraints.txt LICENSE README.md ./
RUN mkdir gptcore gptloom && touch gptcore/__init__.py gptloom/__init__.py \
    && pip install --no-cache-dir -c constraints.txt -e '.[dask,postgres]'
COPY . .

USER gptloom
ENV GPTLOOM_HOME=/data \
    GPTLOOM_ROOT=/app \
    PREFECT_HOME=/data/prefect \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1
VOLUME /data
CMD ["gptloom", "--help"]
