"""Sampling defaults that a model brings along in ``generation_config.json``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from flashserve.text.tokenizer import read_json_object

log = logging.getLogger(__name__)

# Name in the file -> name of the parameter.
NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
NEUTRAL = {"repetition_penalty": 1.0}


def load_generation_defaults(model_dir: Path) -> dict[str, Any]:
    """Defaults of the sampling parameters, by parameter name; empty without the file.

    As in vLLM, ``do_sample`` has no say: a model whose file names no temperature samples with temperature 1, also
    if it says ``do_sample: false``. Raises ConfigError for a file that is not a JSON object; the caller checks the
    values together with everything else.
    """
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return {}
    values = read_json_object(path)
    for name, neutral in NEUTRAL.items():
        if values.get(name, neutral) != neutral:
            log.warning("generation_config.json sets %s=%r, which is not supported and left out", name, values[name])
    return {ours: values[theirs] for theirs, ours in NAMES.items() if values.get(theirs) is not None}
