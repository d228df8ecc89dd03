"""What everything but the model costs, on a runner that computes nothing.

python -m benchmarks.engine overhead                 # one step: scheduling, messages to the stub
python -m benchmarks.engine scheduler                # up to 4,096 running and 100,000 waiting requests
python -m benchmarks.engine stream smollm2-135m      # responses through Triton, one token each and merged
"""

from benchmarks.common.arguments import run_parts
from benchmarks.engine import overhead, scheduler, stream

if __name__ == "__main__":
    run_parts(__doc__, "engine", {"overhead": overhead, "scheduler": scheduler, "stream": stream})
