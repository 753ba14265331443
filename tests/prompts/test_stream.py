"""The stream of training prompts: every item once per epoch, bad samples set aside, on any number of ranks."""

import json
from dataclasses import replace

import pytest
import torch

from vcr1_fast.learner.sharding import SINGLE_PROCESS, World
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.prompts.stream import PromptStream, TooManyBadSamplesError
from vcr1_fast.settings.config import Config, DataConfig, TaskConfig, TrainConfig, VideoConfig
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import ChoiceTruth, Example, IntervalTruth, LabelTruth, Patches, SampleError
from vcr1_fast.video.quarantine import Quarantine


def read(path: str) -> Patches:
    if "bad" in path:
        raise SampleError(path, "the file is empty")
    return Patches(torch.zeros(16, 1176), (1, 4, 4), 1.0, 2, 1.0)


def make_stream(
    tiny_tokenizer, tmp_path, videos, world=SINGLE_PROCESS, data=None, prefetch=lambda videos: None, video=None, **train
) -> PromptStream:
    examples = [
        Example(f"e{i}", "temporal_grounding", video, "a dog barks", 8.0, IntervalTruth(((1.0, 2.0),)))
        for i, video in enumerate(videos)
    ]
    builder = PromptBuilder(tiny_tokenizer, make_tasks(TaskConfig()), read, prefetch=prefetch)
    config = Config(
        train=TrainConfig(prompts_per_step=4, **train), data=data or DataConfig(), video=video or VideoConfig()
    )
    return PromptStream(examples, builder, Quarantine(tmp_path / "quarantine.jsonl"), config, world)


def ids(prompts) -> list[str]:
    return [prompt.example.id for prompt in prompts]


def test_the_digest_is_of_all_that_is_asked(tiny_tokenizer, tmp_path):
    """Options as a file writes them count where they are kept, and only there; the folder of the videos never does."""
    stream = make_stream(tiny_tokenizer, tmp_path, ["a.mp4"])

    def digest(truth, **fields) -> str:
        stream.examples = [Example("e", "multiple_choice", fields.pop("video", "a.mp4"), "why?", 8.0, truth, **fields)]
        del stream.digest
        return stream.digest

    assert stream.digest  # so that there is one to forget
    plain = digest(ChoiceTruth("A", ("a", "b")))
    assert plain == "e31164f48941163b41f1d09b5d22b177"  # as checkpoints from before there were written options have it
    assert digest(ChoiceTruth("A", ("a", "b")), video="other/a.mp4") == plain
    assert digest(ChoiceTruth("B", ("a", "b"))) != plain
    written = {digest(ChoiceTruth("A", ("a", "b"), written=("A. a", last))) for last in ("B. b", "B. b ")}
    assert len(written | {plain}) == 3
    # what else is shown counts, its folder does not, and one video named in the new way is that of the old one
    shown = {digest(ChoiceTruth("A", ("a", "b")), media=(f"{at}/i.png#image", "a.mp4")) for at in ("x", "y")}
    assert len(shown) == 1 and plain not in shown


def test_a_bad_video_is_quarantined_once_and_the_rest_goes_on(tiny_tokenizer, tmp_path, capsys):
    stream = make_stream(tiny_tokenizer, tmp_path, ["a.mp4", "bad.mp4", "b.mp4", "c.mp4"])
    assert sorted(ids(stream.next(4))) == ["e0", "e2", "e3"]
    assert sorted(ids(stream.next(4))) == ["e0", "e2", "e3"]  # second epoch: known bad, not read again
    assert stream.num_bad == 2
    assert capsys.readouterr().err == "bad sample: bad.mp4: the file is empty\n"
    assert (tmp_path / "quarantine.jsonl").read_text().count("\n") == 1


def test_too_many_bad_samples_stop_the_run_with_a_reason(tiny_tokenizer, tmp_path):
    stream = make_stream(tiny_tokenizer, tmp_path, ["bad1.mp4", "bad2.mp4", "a.mp4"], max_bad_sample_frac=0.5)
    for _ in range(4):
        stream.next(4)
    with pytest.raises(
        TooManyBadSamplesError, match=r"13 of 20 samples could not be used, more than .* 0\.5"
    ) as caught:
        stream.next(4)
    assert "2 files (2 empty):" in caught.value.reason
    assert "  bad1.mp4: the file is empty" in caught.value.reason


def test_a_first_step_without_anything_usable_names_the_cause(tiny_tokenizer, tmp_path):
    stream = make_stream(
        tiny_tokenizer, tmp_path, [f"bad{i}.mp4" for i in range(6)], data=DataConfig(video_root="/their")
    )
    with pytest.raises(TooManyBadSamplesError, match=r"nothing of the first step can be used") as caught:
        stream.next(4)
    assert "4 files (4 empty):" in caught.value.reason and "start from /their (data.video_root)" in caught.value.reason


def test_a_small_first_step_may_be_out_of_luck(tiny_tokenizer, tmp_path):
    videos = ["bad.mp4" if i == 0 else f"v{i}.mp4" for i in range(9)]
    stream = make_stream(tiny_tokenizer, tmp_path, videos)
    stream.position = next(p for p in range(9) if stream.order.indices(p, 1) == [0])
    assert stream.next(1) == []
    assert len(stream.next(1)) == 1


def test_examples_without_a_score_come_again_after_1_4_16_and_64_steps(tiny_tokenizer, tmp_path, capsys):
    stream = make_stream(tiny_tokenizer, tmp_path, [f"v{i}.mp4" for i in range(2000)])
    first = ids(stream.next(4))
    lost = first[1]
    seen, steps = [], 0
    stream.put_back([lost])
    while stream.again:
        names = ids(stream.next(4))
        steps += 1
        if lost in names:
            assert names[0] == lost  # before those of the data's order
            seen.append(steps)
            stream.put_back([lost])
    # the position stands still by one in a step in which it comes again: 0, 3, 15 and 63 steps of 4 further positions
    assert seen == [1, 1 + 4, 5 + 16, 21 + 64]
    assert f"{lost} failed 5 times in a row and is left out until its next turn" in capsys.readouterr().err


def test_what_comes_again_is_part_of_the_state_and_loses_nothing(tiny_tokenizer, tmp_path):
    def run(stream: PromptStream, num_steps: int) -> list[list[str]]:
        steps = []
        for _ in range(num_steps):
            steps.append(ids(stream.next(4)))
            stream.put_back([name for name in steps[-1] if name in ("e1", "e5", "e17")])  # these never have a score
        return steps

    videos = [f"v{i}.mp4" for i in range(20)]
    whole = make_stream(tiny_tokenizer, tmp_path, videos)
    steps = run(whole, 12)
    assert set().union(*steps[:8]) == {f"e{i}" for i in range(20)}
    first = make_stream(tiny_tokenizer, tmp_path, videos)
    run(first, 5)
    kept = json.loads(json.dumps({"position": first.position, "again": first.again | {"gone": (1, 3)}}))
    second = make_stream(tiny_tokenizer, tmp_path, videos)
    second.restore(**kept)
    assert run(second, 7) == steps[5:]


def test_a_target_that_has_no_tokens_is_a_bad_sample_where_it_is_taught(tiny_tokenizer, tmp_path):
    stream = make_stream(tiny_tokenizer, tmp_path, [f"v{i}.mp4" for i in range(4)])
    task = stream.builder.tasks["temporal_grounding"]
    task.target = lambda example: "\ud83d" if example.id == "e2" else "<answer></answer>"
    assert len(stream.next(4)) == 4
    stream._needs_target = True
    assert sorted(ids(stream.next(4))) == ["e0", "e1", "e3"]
    assert stream.num_bad_by_reason["error"] == 1


def test_tasks_are_mixed_by_weight_and_their_epochs_reported(tiny_tokenizer, tmp_path):
    truths = [("temporal_grounding", IntervalTruth(((1.0, 2.0),)))] * 3 + [("video_quality", LabelTruth("low"))] * 5
    examples = [Example(f"e{i}", task, f"v{i}.mp4", "a dog", 8.0, truth) for i, (task, truth) in enumerate(truths)]
    builder = PromptBuilder(tiny_tokenizer, make_tasks(TaskConfig()), read)
    data = DataConfig(mixture={"temporal_grounding": 3.0, "video_quality": 1.0})
    config = Config(train=TrainConfig(prompts_per_step=4), data=data)
    stream = PromptStream(examples, builder, Quarantine(None), config, SINGLE_PROCESS)
    tasks = [prompt.example.task for _ in range(25) for prompt in stream.next(4)]
    assert tasks.count("temporal_grounding") == 75
    metrics = stream.metrics()
    assert metrics == {
        "epoch": 100 / 8, "epoch/temporal_grounding": 25.0, "epoch/video_quality": 5.0, "bad_samples": 0.0
    }  # fmt: skip


def test_examples_outside_the_reward_range_are_left_out(tiny_tokenizer, tmp_path, capsys):
    rewards = {"e0": 0.1, "e1": 0.5, "e2": 1.0, "e3": 1.9}
    lines = [json.dumps({"id": name, "reward": reward}) + "\n" for name, reward in rewards.items()]
    (tmp_path / "rewards.jsonl").write_text("".join(lines))
    data = DataConfig(rewards=str(tmp_path / "rewards.jsonl"), reward_range=(0.5, 1.0))
    stream = make_stream(tiny_tokenizer, tmp_path, [f"v{i}.mp4" for i in range(5)], data=data)
    assert sorted(ids(stream.next(3))) == ["e1", "e2", "e4"]
    assert capsys.readouterr().err == (
        "data.reward_range: 3 examples; left out 1 below and 1 above; 1 of those kept have no reward yet\n"
    )


def names_of(stream: PromptStream, count: int) -> list[str]:
    """Videos of the next `count` positions."""
    return [stream.examples[i].video for i in stream.order.indices(stream.position, count)]


def test_clips_of_this_step_and_the_next_ones_are_named_once_and_in_order(tiny_tokenizer, tmp_path):
    named: list[list[str]] = []
    videos = [f"v{i}.mp4" for i in range(20)]
    stream = make_stream(
        tiny_tokenizer, tmp_path, videos, prefetch=lambda clips: named.append(list(clips)),
        video=VideoConfig(prefetch_steps=2),
    )  # fmt: skip
    coming = names_of(stream, 40)
    for _ in range(4):
        stream.next(4)
    assert named == [coming[:12], coming[12:16], coming[16:20], coming[20:24]]  # from 20 on it is the second epoch
    stream.next(6)  # another count: what was named already is not named again
    assert named[4:] == [coming[24:34]]


def test_known_bad_clips_are_not_named(tiny_tokenizer, tmp_path):
    named: list[str] = []
    stream = make_stream(
        tiny_tokenizer, tmp_path, ["a.mp4", "bad.mp4", "b.mp4", "c.mp4"], prefetch=named.extend,
        video=VideoConfig(prefetch_steps=0),
    )  # fmt: skip
    stream.next(4)
    stream.next(4)
    assert sorted(named) == sorted([*["a.mp4", "b.mp4", "c.mp4"] * 2, "bad.mp4"])


def test_a_rank_names_its_own_share(tiny_tokenizer, tmp_path, monkeypatch):
    videos = [f"v{i}.mp4" for i in range(16)]
    shares = []
    for rank in range(2):
        named: list[str] = []
        world = World(rank, 2, rank, torch.device("cpu"))
        monkeypatch.setattr("vcr1_fast.prompts.stream.all_reduce_sum", lambda values, world: values)
        stream = make_stream(
            tiny_tokenizer, tmp_path, videos, world=world, prefetch=named.extend, video=VideoConfig(prefetch_steps=1)
        )
        coming = names_of(stream, 8)
        stream.next(4)
        shares.append(named)
    assert shares == [[*coming[0:2], *coming[4:6]], [*coming[2:4], *coming[6:8]]]


def test_bad_samples_are_counted_by_reason(tiny_tokenizer, tmp_path, monkeypatch):
    reasons = {
        "gone.mp4": "no such file",
        "zero.mp4": "the file is empty (0 bytes)",
        "slow.mp4": "did not finish within",
    }

    def read_or_refuse(path: str) -> Patches:
        if path in reasons:
            raise SampleError(path, reasons[path])
        return read(path)

    stream = make_stream(tiny_tokenizer, tmp_path, [*reasons, "good.mp4"])
    stream.builder._read = read_or_refuse
    stream.next(4)
    stream.next(4)
    metrics = stream.metrics()
    assert {name: value for name, value in metrics.items() if name.startswith("bad_samples")} == {
        "bad_samples": 6.0, "bad_samples/missing": 2.0, "bad_samples/empty": 2.0, "bad_samples/timeout": 2.0
    }  # fmt: skip


def test_a_bad_part_of_a_video_does_not_condemn_the_rest(tiny_tokenizer, tmp_path):
    def read_parts(video: str) -> Patches:
        if "#t=900" in video:
            raise SampleError(video.partition("#")[0], "no frame lies between 900 and 901 s")
        if video == "folder":
            raise SampleError("folder/0003.jpg", "is damaged")
        return read(video)

    stream = make_stream(tiny_tokenizer, tmp_path, ["a.mp4#t=0,2&fps=2", "a.mp4#t=900,901&fps=2", "a.mp4", "folder"])
    stream.builder._read = read_parts
    for _ in range(2):
        assert sorted(ids(stream.next(4))) == ["e0", "e2"]
    assert stream.quarantine.reasons == {
        "a.mp4#t=900,901&fps=2": "no frame lies between 900 and 901 s", "folder": "folder/0003.jpg: is damaged"
    }  # fmt: skip


def test_what_is_bad_is_set_aside_by_its_own_name(tiny_tokenizer, tmp_path):
    """Of several: the next example that shows the same is not built, the one with the good one is."""

    def read_or_blame_path(source: str) -> Patches:
        return read(source.removesuffix("#image"))

    stream = make_stream(tiny_tokenizer, tmp_path, ["a.mp4", "b.mp4", "c.mp4", ""])
    stream.builder._read = read_or_blame_path
    shown = [("i.png#image", "a.mp4"), ("bad.png#image", "b.mp4"), ("c.mp4", "bad.png#image"), ()]
    stream.examples = [replace(example, media=m) for example, m in zip(stream.examples, shown, strict=True)]
    for _ in range(2):
        assert sorted(ids(stream.next(4))) == ["e0", "e3"]
    assert stream.quarantine.reasons == {"bad.png#image": "the file is empty"}


def test_files_that_are_good_by_now_leave_the_list_on_retry(tiny_tokenizer, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    for name in ("a.mp4", "bad.mp4"):
        Quarantine(path).add(SampleError(name, "the file is empty"))
    stream = make_stream(tiny_tokenizer, tmp_path, ["a.mp4", "bad.mp4", "c.mp4", "d.mp4"])
    assert len(stream.next(4)) == 2  # without the setting both are left out
    stream = make_stream(tiny_tokenizer, tmp_path, ["a.mp4", "bad.mp4", "c.mp4", "d.mp4"])
    stream.quarantine = Quarantine(path, retry=True)
    assert len(stream.next(4)) == 3
    assert list(Quarantine(path).reasons) == ["bad.mp4"]
