"""``python -m flashserve.engine``."""

import os
import sys

from flashserve.engine.process import main

status = main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)  # the interpreter's own end takes up to 2 s once torch is loaded, and a stub waits for it
