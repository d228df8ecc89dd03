"""The tensor contract, and how it is declared to Triton."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flashserve.errors import ConfigError
from flashserve.frontend.tensor_spec import INPUTS, OUTPUTS, declare


def triton_model_config(**config: Any) -> Any:
    """Triton's own ModelConfig, as its Python backend makes it from a config.pbtxt."""
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        pytest.skip("needs nvidia-pytriton")
    path = Path(package.origin).parent / "tritonserver/backends/python/triton_python_backend_utils.py"
    spec = importlib.util.spec_from_file_location("pb_utils_for_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig(json.dumps({"name": "m", "max_batch_size": 0, "input": [], "output": [], **config}))


def test_the_contract_is_a_superset_of_the_vllm_backends():
    inputs = {spec.name: (spec.dtype, spec.dims) for spec in INPUTS}
    vllm = {
        "text_input": "STRING", "stream": "BOOL", "sampling_parameters": "STRING", "exclude_input_in_output": "BOOL",
        "return_finish_reason": "BOOL", "return_cumulative_logprob": "BOOL", "return_logprobs": "BOOL",
        "return_num_input_tokens": "BOOL", "return_num_output_tokens": "BOOL",
    }  # fmt: skip
    for name, dtype in vllm.items():
        assert inputs[name] == (dtype, (1,))
    assert inputs["image"] == ("STRING", (-1,))
    assert all(spec.optional for spec in INPUTS)
    assert {spec.name: (spec.dtype, spec.dims) for spec in OUTPUTS} == {
        "text_output": ("STRING", (-1,)),
        "finish_reason": ("STRING", (-1,)),
        "cumulative_logprob": ("FP32", (-1,)),
        "logprobs": ("STRING", (-1,)),
        "prompt_logprobs": ("STRING", (1,)),
        "num_input_tokens": ("UINT32", (1,)),
        "num_output_tokens": ("UINT32", (-1,)),
        "request_metrics": ("STRING", (1,)),
        "prompt_progress": ("STRING", (1,)),
    }


def test_an_empty_config_gets_everything():
    config = declare(triton_model_config()).as_dict()
    assert config["max_batch_size"] == 0
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert [entry["name"] for entry in config["input"]] == [spec.name for spec in INPUTS]
    assert config["input"][0] == {"name": "text_input", "data_type": "TYPE_STRING", "dims": [1], "optional": True}
    assert [entry["name"] for entry in config["output"]] == [spec.name for spec in OUTPUTS]
    assert config["output"][4] == {"name": "num_input_tokens", "data_type": "TYPE_UINT32", "dims": [1]}


def test_a_config_may_repeat_the_contract_in_full_or_in_part():
    entry = {"name": "stream", "data_type": "TYPE_BOOL", "dims": [1], "optional": True, "format": "FORMAT_NONE"}
    open_entry = {"name": "max_tokens", "data_type": "TYPE_INVALID", "dims": [], "optional": True}
    output = {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1], "is_shape_tensor": False}
    policy = {"decoupled": True}
    config = triton_model_config(input=[entry, open_entry], output=[output], model_transaction_policy=policy)
    declared = declare(config).as_dict()
    assert sorted(entry["name"] for entry in declared["input"]) == sorted(spec.name for spec in INPUTS)
    assert declared["input"][1]["data_type"] == "TYPE_INT32"


def test_declaring_twice_changes_nothing():
    config = declare(triton_model_config())
    before = json.dumps(config.as_dict())
    assert json.dumps(declare(config).as_dict()) == before


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_batch_size": 8}, "config.pbtxt sets max_batch_size: 8, it must be 0"),
        ({"model_transaction_policy": {"decoupled": False}}, "config.pbtxt sets decoupled: false, it must be true"),
        (
            {"input": [{"name": "stream", "data_type": "TYPE_INT32", "dims": [1], "optional": True}]},
            "declares the input 'stream' with data_type: TYPE_INT32, not TYPE_BOOL; remove the entry",
        ),
        (
            {"input": [{"name": "stream", "data_type": "TYPE_BOOL", "dims": [1], "optional": False}]},
            "declares the input 'stream' with optional: False, not True",
        ),
        (
            {"output": [{"name": "text_output", "data_type": "TYPE_STRING", "dims": [2]}]},
            r"declares the output 'text_output' with dims: \[2\], not \[-1\]",
        ),
        ({"input": [{"name": "prompt"}]}, "declares the input 'prompt', which flashserve does not have"),
    ],
)
def test_contradictions_in_config_pbtxt_say_what_to_do(config, words):
    with pytest.raises(ConfigError, match=words):
        declare(triton_model_config(**config))


def test_declaring_needs_no_library_but_the_standard_one():
    """auto_complete_config runs in an interpreter of its own before every load."""
    code = (
        "import sys, flashserve.frontend.tensor_spec\n"
        "heavy = {'numpy', 'msgspec', 'tokenizers', 'jinja2', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
