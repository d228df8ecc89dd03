"""``python -m flashserve.engine``."""

from flashserve.engine.process import main

raise SystemExit(main())
