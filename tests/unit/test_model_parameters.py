"""Parameters of config.pbtxt that Triton's vLLM backend knows, with their meaning there."""

import json

import pytest

from flashserve.errors import ConfigError
from flashserve.frontend.model_parameters import ModelParameters, read


def config(backend="flashserve", **parameters):
    return json.dumps({"backend": backend, "parameters": {k: {"string_value": v} for k, v in parameters.items()}})


def test_defaults_are_ours_or_those_of_the_vllm_backend():
    assert read(config()) == ModelParameters(report_metrics=True, plain_errors=False, health_check=False)
    assert read(config("vllm")) == ModelParameters(report_metrics=False, plain_errors=True, health_check=False)


@pytest.mark.parametrize("backend", ["flashserve", "vllm"])
def test_what_is_said_holds_for_both(backend):
    assert read(config(backend, REPORT_CUSTOM_METRICS="true")).report_metrics
    assert not read(config(backend, REPORT_CUSTOM_METRICS="False")).report_metrics
    assert not read(config(backend, REPORT_CUSTOM_METRICS="true"), disable_log_stats=True).report_metrics
    assert read(config(backend, ENABLE_VLLM_HEALTH_CHECK="True")).health_check
    assert not read(config(backend, ENABLE_VLLM_HEALTH_CHECK="false")).health_check


def test_parameters_of_others_are_none_of_ours():
    assert read(config(FORCE_CPU_ONLY_INPUT_TENSORS="no")) == read(config())


@pytest.mark.parametrize("name", ["REPORT_CUSTOM_METRICS", "ENABLE_VLLM_HEALTH_CHECK"])
def test_a_value_that_is_neither_is_refused(name):
    with pytest.raises(ConfigError, match=f'{name} must be "true" or "false", not \'yes\''):
        read(config(**{name: "yes"}))
