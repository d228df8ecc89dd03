"""Steps and ops on this CPU, beside what its memory and its cores can do at most.

python -m benchmarks.cpu step smollm2-135m [--quantization int8]
python -m benchmarks.cpu ops [--kinds linear attention] [--tokens 1,1000] [--int8]
python -m benchmarks.cpu constrained              # what structured outputs cost those beside them
"""

from benchmarks.common.arguments import run_parts
from benchmarks.cpu import constrained, ops, step

if __name__ == "__main__":
    run_parts(__doc__, "cpu", {"step": step, "ops": ops, "constrained": constrained})
