# The image of `jilju serve`: docs/install.md says how to build and run it, `make image-check` runs its last stage here.
FROM python:3.11-slim-bookworm AS wheel
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist -Ccmake.define.JILJU_STATIC_CXX=ON .

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin jilju
# pip stays in: it fetches the models that have a name
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    python -m venv /opt/jilju && /opt/jilju/bin/pip install --no-cache-dir --only-binary :all: /dist/*.whl
COPY deploy/healthcheck.py /opt/jilju/healthcheck.py
# Models, packed weights and accepted licences: a volume, or every new container fetches and packs again.
RUN install --directory --owner=jilju --group=jilju --mode=0700 /var/cache/jilju
VOLUME /var/cache/jilju
ENV PATH=/opt/jilju/bin:$PATH JILJU_CACHE=/var/cache/jilju JILJU_HOST=0.0.0.0 JILJU_PORT=8000
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start fetches the model: until it is ready, or the start period is over, a failed check counts for nothing.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m CMD ["python", "/opt/jilju/healthcheck.py"]
ENTRYPOINT ["jilju"]
CMD ["serve"]
