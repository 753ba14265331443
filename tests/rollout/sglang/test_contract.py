"""Every field that goes to SGLang or comes from it, against the classes of the SGLangs that are installed."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from vcr1_fast.rollout.sglang_engine import engine_args
from vcr1_fast.settings.learning import SGLangConfig

HERE = Path(__file__).parent
CHECKS = [
    "engine_arguments",
    "generate_arguments",
    "request_is_expanded_to_a_group",
    "sampling_parameters",
    "video_becomes_one_item",
    "weight_bucket_crosses_the_process_border",
    "only_the_last_bucket_sets_the_version",
    "weights_by_broadcast",
    "update_group",
    "memory_by_tags",
    "cuda_handle_is_rebuilt_by_sglang",
    "answers_have_what_is_read",
    "a_restart_beside_a_learner_gets_its_whole_cache",
    "a_token_takes_as_much_of_the_cache_as_the_plan_says",
    "check_loader_is_found",
    "the_cache_of_videos_is_found_and_emptied",
]

pytestmark = pytest.mark.sglang


@pytest.fixture(scope="module", params=["sglang_python", "oldest_python"])
def outcome(request: pytest.FixtureRequest) -> dict[str, str]:
    python = request.getfixturevalue(request.param)
    config, model = SGLangConfig(release_memory=True), Path("/model")
    arguments = dict(engine_args(config, model, torch.float32, torch.device("cpu"), 0, can_penalise=True))
    arguments |= engine_args(config, model, torch.bfloat16, torch.device("cuda", 1), 0)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HERE.parents[2]), "ENGINE_ARGS": json.dumps(arguments)}
    done = subprocess.run(
        [python, str(HERE / "contract_checks.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_contract(outcome: dict[str, str], check: str):
    assert outcome[check] == ""


def test_no_check_is_forgotten(outcome: dict[str, str]):
    assert sorted(outcome) == sorted(CHECKS)
