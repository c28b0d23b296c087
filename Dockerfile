# One image for CPU and GPU: torch's default build runs on both (`docker run --gpus all …` for the second).
#
#   docker build -t prunecli .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" prunecli compress --recipe quickstart --out /data/run
#
# BASE_IMAGE  any image with `python` >= 3.11 and pip.
# PIP_ARGS    further words for pip, e.g. "--no-index --find-links /wheels" with `--build-context wheels=DIR`.
ARG BASE_IMAGE=python:3.12-slim

# Empty for ordinary builds; `--build-context wheels=DIR` puts a folder of wheels in its place.
FROM scratch AS wheels

FROM ${BASE_IMAGE}
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# The dependencies change rarely and weigh gigabytes: they are a layer of their own, built from pyproject alone.
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p prunecli recipes && printf '__version__ = "0"\n' > prunecli/__init__.py
RUN --mount=type=bind,from=wheels,target=/wheels \
    python -m venv /opt/prunecli && /opt/prunecli/bin/pip install ${PIP_ARGS} -c constraints.txt . \
    && /opt/prunecli/bin/pip uninstall -y prunecli

COPY prunecli prunecli
COPY recipes recipes
RUN --mount=type=bind,from=wheels,target=/wheels \
    /opt/prunecli/bin/pip install ${PIP_ARGS} --no-deps . && rm -rf /src

# Whoever runs the container owns what it writes: any --user works, because nothing outside /data and /tmp is written.
RUN useradd --create-home --uid 1000 prunecli && mkdir -p /data && chown prunecli /data
USER prunecli
WORKDIR /data
ENV PATH=/opt/prunecli/bin:$PATH HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
ENTRYPOINT ["prunecli"]
CMD ["--help"]
