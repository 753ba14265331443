"""The oldest SGLang that is supported: it has no update sessions, and other classes inside."""

from pathlib import Path

from tests.rollout.sampled_policy import policy_of
from tests.rollout.sglang.parity import BOUND, difference, disturb, short_and_long
from tests.rollout.timed_prompt import timed_prompt
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.types import SamplingParams

PINS = Path(__file__).with_name("constraints-oldest.txt").read_text().split()


def test_oldest_version_agrees_before_and_after_an_update(oldest, make_prompt):
    version = oldest.engine._workers.seats[0].worker.version
    assert f"sglang=={version}" in PINS  # not the newer one that stands behind it on the path
    policy = policy_of(oldest.make_model(31))
    prompts = [] if oldest.video.reads_times else short_and_long(make_prompt)
    prompts += [timed_prompt(oldest.engine.tokenizer, (t, 4, 4), t, oldest.video) for t in (3, 40)]
    sync = WeightSync(policy, oldest.engine)
    for update in range(2):
        assert sync.push().policy_version == update + 1  # the first one is read back and compared
        worst, spread = difference(policy, prompts, oldest.engine.generate(prompts, SamplingParams(4, 12)))
        assert spread > 0.5
        assert worst < BOUND
        disturb(policy, update)
