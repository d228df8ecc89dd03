"""The engine process of the faulty backend; takes the arguments of an interpreter that is to run the real one."""

import sys

from faulty_backend import BREAKS_STEP, SECRET

from flashserve.engine.process import main
from flashserve.runner.null_runner import NullRunner

sound_submit = NullRunner.submit


def faulty_submit(self, plan):
    if any(row.token_ids and row.token_ids[-1] == BREAKS_STEP for row in plan.rows):
        raise RuntimeError(SECRET)
    return sound_submit(self, plan)


NullRunner.submit = faulty_submit
raise SystemExit(main(sys.argv[sys.argv.index("flashserve.engine") + 1 :]))
