"""Every field that goes to SGLang or comes from it, against the classes of the SGLang that is installed."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from vcr1_fast.config_learning import SGLangConfig
from vcr1_fast.rollout.sglang_engine import engine_args

HERE = Path(__file__).parent
CHECKS = [
    "engine_arguments",
    "generate_arguments",
    "request_is_expanded_to_a_group",
    "sampling_parameters",
    "video_becomes_one_item",
    "weight_bucket_crosses_the_process_border",
    "update_session",
    "check_loader_is_found",
]


@pytest.fixture(scope="module")
def outcome(sglang_python: str) -> dict[str, str]:
    arguments = engine_args(SGLangConfig(), Path("/model"), torch.float32, torch.device("cpu"), 0)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HERE.parents[2]), "ENGINE_ARGS": json.dumps(arguments)}
    done = subprocess.run(
        [sglang_python, str(HERE / "contract_checks.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_contract(outcome: dict[str, str], check: str):
    assert outcome[check] == ""


def test_no_check_is_forgotten(outcome: dict[str, str]):
    assert sorted(outcome) == sorted(CHECKS)
