"""Steps and ops on this CPU, beside what its memory and its cores can do at most.

python -m benchmarks.cpu step smollm2-135m [--quantization int8]
python -m benchmarks.cpu linear [--shape tinyllama-1.1b] [--layers gate_up] [--rows 1,1000]
python -m benchmarks.cpu attention [--kv-dtype int8]
"""

from benchmarks.common.arguments import run_parts
from benchmarks.cpu import attention, linear, step

if __name__ == "__main__":
    run_parts(__doc__, "cpu", {"step": step, "linear": linear, "attention": attention})
