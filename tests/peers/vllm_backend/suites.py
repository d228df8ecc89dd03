"""What is run and what is expected of it: the one table of suites, tests, and failures with their reasons."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import rewrite

BACKEND = "ci/L0_backend_vllm"


@dataclass(frozen=True)
class ExpectedFailure:
    """A test of something that flashserve says it does not do."""

    reason: str
    pattern: str
    """Occurs in what the test reports; a failure for another reason is not the expected one."""


@dataclass(frozen=True)
class ExpectedTest:
    """One run of one test, or of all cases of a parametrised one that share what is expected of them.

    A script may run a test several times, with other settings; then it is here as often.
    """

    name: str
    """Class and method."""
    note: str = ""
    failure: ExpectedFailure | None = None
    cases: str = ""
    """What matches the parameters, the part of the name in brackets."""
    count: int = 1
    """How many there are."""


@dataclass(frozen=True)
class Step:
    """Something that a script checks itself."""

    name: str
    complaint: str
    """What it then says on its standard output."""


@dataclass(frozen=True)
class Edit:
    """Text that is replaced wherever it occurs, in addition to the values of the model."""

    file: str
    old: str
    new: str
    why: str


@dataclass(frozen=True)
class Suite:
    """A folder with a ``test.sh``."""

    name: str
    folder: str
    tests: tuple[ExpectedTest, ...]
    """In the order in which they run."""
    values: dict[str, rewrite.Changes] = field(default_factory=dict)
    """Files with texts or counts of the suite's model, and who finds them."""
    steps: tuple[Step, ...] = ()
    edits: tuple[Edit, ...] = ()
    simulates_failure: bool = False
    """The backend's model.py gets ``simulated_failure.py``."""
    timeout_s: float = 300


LOG_TEXT = ExpectedFailure(
    "looks for two lines of vLLM's log after everything else", re.escape("'[vllm] Cancelling the request' not found in")
)

ACCURACY = "VLLMTritonAccuracyTest"
BACKEND_TEST = "VLLMTritonBackendTest"
METRICS = "VLLMTritonMetricsTest"
STREAM = "VLLMTritonStreamTest"
HEALTH = "TestCheckHealth"
ADDITIONAL = "TestAdditionalOutputs.test_additional_outputs"

SUITES = (
    Suite(
        "accuracy_test",
        f"{BACKEND}/accuracy_test",
        (
            ExpectedTest(f"{ACCURACY}.test_structured_outputs"),
            ExpectedTest(f"{ACCURACY}.test_vllm_model"),
        ),
    ),
    Suite(
        "accuracy_compared",
        f"{BACKEND}/accuracy_test",
        (ExpectedTest(f"{ACCURACY}.test_vllm_model"),),
        edits=(
            Edit(
                "test.sh",
                "python3 $CLIENT_PY > $CLIENT_LOG",
                f"python3 -m unittest accuracy_test.{ACCURACY}.test_vllm_model > $CLIENT_LOG",
                "alone, as the other test leaves structured_outputs in its parameters",
            ),
            Edit("test.sh", "EXPECTED_NUM_TESTS=2", "EXPECTED_NUM_TESTS=1", "alone"),
            Edit(
                "accuracy_test.py",
                "self.assertEqual(self.python_vllm_output.sort(), triton_vllm_output.sort())",
                "self.assertEqual(sorted(self.python_vllm_output), sorted(triton_vllm_output))",
                "list.sort() is None, so the original compares None with None",
            ),
        ),
    ),
    Suite(
        "request_cancellation",
        f"{BACKEND}/request_cancellation",
        (ExpectedTest("VLLMRequestCancelTest.test_request_cancellation", failure=LOG_TEXT),),
    ),
    Suite(
        "enabled_stream",
        f"{BACKEND}/enabled_stream",
        (
            ExpectedTest(f"{STREAM}.test_vllm_model_enabled_stream"),
            ExpectedTest(f"{STREAM}.test_vllm_model_enabled_stream_exclude_input_in_output_default"),
            ExpectedTest(f"{STREAM}.test_vllm_model_enabled_stream_exclude_input_in_output_false"),
        ),
        values={"enabled_stream_test.py": rewrite.streamed_texts},
    ),
    Suite(
        "vllm_backend",
        f"{BACKEND}/vllm_backend",
        (
            ExpectedTest(f"{BACKEND_TEST}.test_exclude_input_in_output_default"),
            ExpectedTest(f"{BACKEND_TEST}.test_exclude_input_in_output_false"),
            ExpectedTest(f"{BACKEND_TEST}.test_exclude_input_in_output_true"),
            ExpectedTest(f"{BACKEND_TEST}.test_model_with_invalid_attributes"),
            ExpectedTest(f"{BACKEND_TEST}.test_vllm_invalid_model_name"),
            ExpectedTest(f"{BACKEND_TEST}.test_vllm_triton_backend"),
        ),
        values={"vllm_backend_test.py": rewrite.whole_texts},
        steps=(
            Step("settings of the Python backend reach it", "Cmdline parameters verification Failed"),
            Step("a second model loads", "Failed to load 'vllm_two' model"),
        ),
    ),
    Suite(
        "metrics_test",
        f"{BACKEND}/metrics_test",
        (
            ExpectedTest(f"{METRICS}.test_vllm_metrics_disabled", "REPORT_CUSTOM_METRICS absent"),
            ExpectedTest(f"{METRICS}.test_vllm_metrics_disabled", 'REPORT_CUSTOM_METRICS "false"'),
            ExpectedTest(f"{METRICS}.test_vllm_metrics"),
            ExpectedTest(f"{METRICS}.test_custom_sampling_params"),
            ExpectedTest(f"{METRICS}.test_vllm_metrics_disabled", "disable_log_stats"),
            ExpectedTest(f"{METRICS}.test_vllm_metrics_refused"),
        ),
        values={"vllm_metrics_test.py": rewrite.prompt_tokens},
    ),
    Suite(
        "check_health",
        "ci/L0_check_health_vllm",
        (
            ExpectedTest(f"{HEALTH}.test_vllm_is_healthy", "ENABLE_VLLM_HEALTH_CHECK absent"),
            ExpectedTest(f"{HEALTH}.test_vllm_is_healthy", '"false"'),
            ExpectedTest(f"{HEALTH}.test_vllm_is_healthy", '"true"'),
            ExpectedTest(f"{HEALTH}.test_vllm_is_healthy", "absent, failure simulated"),
            ExpectedTest(f"{HEALTH}.test_vllm_is_healthy", '"false", failure simulated'),
            ExpectedTest(f"{HEALTH}.test_vllm_not_healthy", '"true", failure simulated'),
        ),
        edits=(
            Edit(
                "test.sh",
                'VLLM_INSTALL_PATH="/usr/local/lib/python3.12/dist-packages/vllm"',
                'VLLM_INSTALL_PATH="$VLLM_SUITE_INSTALL"',
                "there is no vLLM whose file could be changed to simulate a failure",
            ),
        ),
        simulates_failure=True,
    ),
    Suite(
        "additional_outputs",
        "ci/L0_additional_outputs_vllm",
        (ExpectedTest(ADDITIONAL, "all combinations", cases=".*", count=1458),),
        values={"additional_outputs_test.py": rewrite.shorter_text},
        timeout_s=1800,
    ),
)

NOT_RUN = {
    "ci/L0_multi_gpu_vllm": "several GPUs, and LoRA",
}
