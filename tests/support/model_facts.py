"""What an engine on this CPU finds out about a model's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flashserve.config import EngineConfig, ModelFacts
from flashserve.models.registry import open_model, read_model_facts
from flashserve.runner.device import CpuDevice


def facts_of(folder: Path, **settings: Any) -> ModelFacts:
    """settings: those of model.json."""
    config = EngineConfig(model=str(folder), **settings)
    return read_model_facts(open_model(config), config, CpuDevice().read_facts())
