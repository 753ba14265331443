"""A real engine whose model lies in two processes (rollout.sglang.tp_size 2): weights and answers are the learner's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from tests.conftest import ModelFactory
from tests.rollout.sampled_policy import policy_of
from tests.rollout.sglang.conftest import MakePrompt
from tests.rollout.sglang.parity import BOUND, difference, disturb
from tests.rollout.sglang.test_delivery_real import delivering
from vcr1_fast.rollout.addresses import show
from vcr1_fast.rollout.rollout_key import VARIABLE
from vcr1_fast.rollout.serve import Server
from vcr1_fast.rollout.sgl.delivery import Broadcast
from vcr1_fast.rollout.sglang_engine import SGLangEngine
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.settings.learning import SGLangConfig
from vcr1_fast.types import SamplingParams

KEY = b"k" * 32


@pytest.fixture(scope="module")
def engine(
    settings: SGLangConfig,
    random_folder: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SGLangEngine]:
    config = replace(settings, placement="disaggregated", tp_size=2, weights="broadcast")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|0")  # cores of each process; SGLang wants them named
        environment.setenv(VARIABLE, KEY.hex())
        logs = tmp_path_factory.mktemp("serve")
        server = Server(config, random_folder, bind=("127.0.0.1", 0), gpus=[None], key=KEY, logs=logs)
        try:
            server.start(config.start_timeout_s)
            addresses = tuple(show(station.address) for station in server.stations)
            engine = SGLangEngine(random_folder, tiny_tokenizer, replace(config, addresses=addresses))
            try:
                yield engine
            finally:
                engine.close()
        finally:
            server.close()


@pytest.mark.slow
def test_shares_of_every_weight_arrive_and_answer_as_the_learner_does(
    engine: SGLangEngine, make_tiny_model: ModelFactory, make_prompt: MakePrompt
):
    """Log-probs alone show it: what a process holds of a weight is not compared with what was sent."""
    policy = policy_of(make_tiny_model(seed=41))
    prompts = [make_prompt((2, 4, 4), "when", 1.0, 1), make_prompt((3, 8, 4), "where", 0.7, 2)]
    sync = WeightSync(policy, engine)
    for update, way in enumerate(("broadcast", "shared_memory")):
        with delivering(engine, way):
            engine._workers.seats[0].is_checked = False
            sync.push()
            largest, spread = difference(policy, prompts, engine.generate(prompts, SamplingParams(3, 8)))
            assert largest < BOUND and spread > 0.5
            if way == "broadcast":
                delivery = engine._workers._delivery
                assert isinstance(delivery, Broadcast) and delivery._group is not None and delivery._group.size == 3
        disturb(policy, update)
