# The image of a training: docker build -t IMAGE .
# The wheels of torch and DALI bring CUDA's libraries; the image adds its runtime and what the driver needs.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# torch.compile builds kernels with gcc and Python's headers.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/convoy/bin:$PATH

# Another index of packages: --build-arg PIP_INDEX_URL=ADDRESS --build-arg UV_DEFAULT_INDEX=ADDRESS
ARG PIP_INDEX_URL UV_DEFAULT_INDEX

COPY requirements.lock /tmp/
RUN python3 -m venv /opt/convoy \
 && sed -n '/^uv==/,/[^\\]$/p' /tmp/requirements.lock > /tmp/uv.txt \
 && pip install --no-cache-dir --require-hashes -r /tmp/uv.txt \
 && uv pip sync --no-cache --compile-bytecode --require-hashes --python /opt/convoy/bin/python /tmp/requirements.lock

WORKDIR /convoy
COPY conf conf
COPY data data
COPY models models
COPY pipeline pipeline
RUN python -m compileall -q data models pipeline

# The modules of the image are used in any working directory; caches of compiled kernels need a folder and a user's name.
ENV PYTHONPATH=/convoy PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HOME=/tmp USER=convoy
USER 1000:1000
ENTRYPOINT []
CMD ["python", "-m", "pipeline.train", "--help"]
