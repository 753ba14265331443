"""Held-out scores: failures stay in the denominator, baselines stand beside them, interrupted ones go on."""

import contextlib
import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests.judge.judge_server import judges_by_words, serving
from tests.rollout.scripted_engine import ScriptedEngine
from tests.tiny_policy import run_ranks
from vcr1_fast.evaluate import answer_all, evaluate, evaluate_command
from vcr1_fast.evaluation.answer_forms import answer_forms
from vcr1_fast.evaluation.answer_store import AnswerStore, question_key
from vcr1_fast.evaluation.samples import Answer, Sample, of_all, per_sample_metrics, read_samples, with_refused
from vcr1_fast.evaluation.score_tables import category_means, print_categories, print_scores
from vcr1_fast.evaluation.scores import flat_scores, score_answers, scores_as_dict, scores_from_dict
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.settings.config import Config, ConfigError, EvalConfig, RolloutConfig, TaskConfig
from vcr1_fast.settings.io import load_config
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset
from vcr1_fast.tasks import make_tasks
from vcr1_fast.types import (
    ChoiceTruth,
    Example,
    GroundedChoiceTruth,
    IntervalTruth,
    LabelTruth,
    Patches,
    RefusedTruth,
    SampleError,
    SamplingParams,
    TrackTruth,
)
from vcr1_fast.video.patches import PatchSource

BOX = (0.2, 0.2, 0.4, 0.4)


def read(path: str) -> Patches:
    if path == "bad.mp4":
        raise SampleError(path, "the file is empty")
    return Patches(torch.zeros(16, 1176), (1, 4, 4), 1.0, 2, 8.0)


def grounding(name: str, video: str = "a.mp4") -> Example:
    return Example(name, "temporal_grounding", video, "a dog barks", 8.0, IntervalTruth(((2.0, 4.0),)))


ALL_TASKS = [
    grounding("g"),
    Example("t", "object_tracking", "a.mp4", "dog", 8.0, TrackTruth((BOX,) * 8, tuple(map(float, range(8))))),
    Example("q", "grounded_qa", "a.mp4", "why?", 8.0, GroundedChoiceTruth("A", ("a", "b"), ((2.0, 4.0),))),
    Example("c", "multiple_choice", "a.mp4", "why?", 8.0, ChoiceTruth("A", ("a", "b"))),
    Example("l", "video_quality", "a.mp4", "how good?", 8.0, LabelTruth("low quality")),
]


def score(tiny_tokenizer, examples, answers, **options):
    tasks = make_tasks(TaskConfig())
    engine = ScriptedEngine(tiny_tokenizer, answers)
    builder = PromptBuilder(tiny_tokenizer, tasks, read)
    return evaluate(engine, examples, builder, tasks, Config(eval=EvalConfig(**options)), SINGLE_PROCESS)


def test_an_unreadable_video_counts_as_wrong(tiny_tokenizer, capsys):
    right = "<think>x</think><answer>2.00 to 4.00</answer>"
    half = "<think>x</think><answer>2.00 to 3.00</answer>"
    examples = [grounding("a"), grounding("b", "bad.mp4"), grounding("c")]
    scores = score(tiny_tokenizer, examples, {"a": [right], "c": [half]})["temporal_grounding"]
    assert scores.metrics["miou"] == pytest.approx((1.0 + 0.0 + 0.5) / 3)
    assert scores.metrics["r@0.7"] == pytest.approx(1 / 3)
    assert (scores.num_examples, scores.num_bad) == (3, 1)
    assert "bad sample, not asked, wrong where it is scored: bad.mp4: the file is empty" in capsys.readouterr().err


def refused(name: str, task: str = "temporal_grounding") -> Example:
    return Example(name, task, "r.mp4", "a cat", float("inf"), RefusedTruth("interval 0 is reversed"))


def test_a_refused_annotation_counts_as_wrong_with_and_without_a_model(tiny_tokenizer, capsys):
    """IoU 1 and 0.5 of two answers beside two refused rows; the whole video has 2 / 8 of each usable one."""
    right, half = (f"<think>x</think><answer>2.00 to {end}</answer>" for end in ("4.00", "3.00"))
    examples = [refused("1"), grounding("a"), refused("2"), grounding("c", "c.mp4"), refused("3", "video_quality")]
    scores = score(tiny_tokenizer, examples, {"a": [right], "c": [half]})
    assert list(scores) == ["temporal_grounding"]
    assert "no score of task video_quality: all of its 1 held-out rows are refused" in capsys.readouterr().err
    found = scores["temporal_grounding"]
    assert found.metrics["miou"] == pytest.approx((0 + 1.0 + 0 + 0.5) / 4)
    assert found.metrics["r@0.7"] == pytest.approx(1 / 4)
    assert found.trivial["whole_video"]["miou"] == pytest.approx((0 + 0.25 + 0 + 0.25) / 4)
    assert (found.num_examples, found.num_bad, found.num_refused) == (4, 0, 2)
    low, high = found.intervals["miou"]
    assert low == 0.0 and 0.375 < high <= 1.0
    print_scores({}, scores)
    assert "2 of 4 rows refused, counted as 0" in capsys.readouterr().out


def test_a_refused_annotation_says_nothing_about_the_judge():
    metrics = {"f1": 0.5, "recall": 0.25, "judged": 1.0}
    assert of_all(metrics, 0.75) == {"f1": 0.375, "recall": 0.1875, "judged": 1.0}
    assert of_all(metrics | {"judged": 0.5}, 0.75)["judged"] == 0.5 * 0.75 + 0.25
    examples = [grounding("a"), refused("1"), grounding("c")]
    assert with_refused([1.0, 0.5], examples, "recall") == [1.0, 0.0, 0.5]


def test_files_with_folders_and_tasks_of_their_own_and_refused_rows_in_samples(tmp_path, monkeypatch, capsys):
    """Two files name the video a.mp4, which lies in two folders; of the second file only the choice is wanted."""
    row = {"task": "temporal_grounding", "video": "a.mp4", "query": "x", "duration_s": 4, "intervals": [[1, 2]]}
    choice = {"id": "7", "video": "a.mp4", "question": "why?", "options": ["(A) a", "(B) b"], "answer": "(B)"}
    choice |= {"glue": [[1, 2]], "duration": 4, "type": "CW"}
    grounding_rows = [row, row | {"intervals": [[2, 1]], "categories": {"kind": ["late", "odd"]}}, {"task": "nothing"}]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in grounding_rows))
    (tmp_path / "two.json").write_text(json.dumps([choice]))
    overrides = [
        f"--data.eval=[{{path: {tmp_path}/one.jsonl, video_root: {tmp_path}/first}}, "
        f"{{path: {tmp_path}/two.json, task: multiple_choice}}]",
        f"--data.video_root={tmp_path}/second",
        f"--eval.output_dir={tmp_path}/out",
    ]
    right = {
        "one:1": ["<think></think><answer>1.00 to 2.00</answer>"],
        "7:choice": ["<think></think><answer>B</answer>"],
    }
    monkeypatch.setattr("vcr1_fast.run.run.Run.open_engine", lambda run: ScriptedEngine(run.builder.tokenizer, right))
    monkeypatch.setattr(PatchSource, "__call__", lambda source, video: read("a.mp4"))
    scores = evaluate_command(load_config("tiny", overrides))["scores"]
    assert scores["temporal_grounding"]["metrics"]["miou"] == pytest.approx(0.5)
    assert scores["multiple_choice"]["metrics"]["acc"] == 1.0
    good, bad, letter = read_samples(tmp_path / "out" / "samples.jsonl")
    assert [sample.id for sample in (good, bad, letter)] == ["one:1", "one:2", "7:choice"]
    assert [sample.video for sample in (good, letter)] == [f"{tmp_path}/first/a.mp4", f"{tmp_path}/second/a.mp4"]
    assert bad.failure == "the annotation was refused: interval 0 ends (1.0 s) before it starts (2.0 s)"
    assert (bad.metrics["miou"], bad.parts, bad.answer) == (0.0, {"format": 0.0, "iou": 0.0}, "")
    assert [(s.truth, s.parsed) for s in (good, letter)] == [("1.00 to 2.00", "1.00 to 2.00"), ("B", "B")]
    assert (bad.truth, bad.parsed) == ("refused: interval 0 ends (1.0 s) before it starts (2.0 s)", "")
    assert (bad.categories, letter.categories) == ({"kind": ["late", "odd"]}, {"type": ["CW"]})
    out, err = capsys.readouterr()
    assert "data.eval: 2 of 4 rows left out, of which 1 count as wrong answers" in err
    assert "warning: 2 examples so far have another length than their video" in err  # 4 s and not 8
    assert "temporal_grounding by kind" in out and "multiple_choice by type" in out


def test_baselines_and_tasks_are_kept_apart(tiny_tokenizer):
    track = Example("t", "object_tracking", "a.mp4", "dog", 8.0, TrackTruth((BOX, BOX), (0.0, 4.0)))
    answers = {"a": ["nothing"], "t": ["<think></think><answer>[[0.2,0.2,0.4,0.4],[0.2,0.2,0.4,0.4]]</answer>"]}
    scores = score(tiny_tokenizer, [grounding("a"), track], answers)
    assert list(scores) == ["temporal_grounding", "object_tracking"]
    assert scores["temporal_grounding"].metrics["miou"] == 0.0
    assert scores["temporal_grounding"].trivial["whole_video"]["miou"] == pytest.approx(2 / 8)
    assert scores["object_tracking"].metrics["mean_overlap"] == pytest.approx(1.0)
    assert scores["object_tracking"].trivial["repeat_first_box"]["mean_overlap"] == pytest.approx(1.0)
    assert flat_scores(scores)["object_tracking/mean_overlap"] == pytest.approx(1.0)


def test_readable_and_well_formed_answers_stand_beside_the_score(tiny_tokenizer, capsys):
    """6 rows: right in form, right without tags, in form but of no use, empty, an unreadable video, a refused row."""
    said = ["<think>x</think><answer>2.00 to 4.00</answer>", "From 2.0 to 3.0 seconds."]
    said += ["<think>x</think><answer>2.00s to 4.00s</answer>", ""]
    answers = [*map(Answer, said), Answer("", "bad.mp4: the file is empty"), Answer("", "the annotation was refused")]
    examples = [*(grounding(name) for name in "abcd"), grounding("e", "bad.mp4"), refused("f")]
    scores, samples = score_answers(make_tasks(TaskConfig()), examples, answers, 0, with_samples=True)
    found = scores["temporal_grounding"]
    assert found.metrics["miou"] == pytest.approx((1 + 0.5) / 6)
    assert (found.readable, found.well_formed, found.num_examples) == (2 / 6, 2 / 6, 6)
    assert [sample.readable for sample in samples] == [True, True, False, False, False, False]
    assert [sample.well_formed for sample in samples] == [True, False, True, False, False, False]
    assert flat_scores(scores)["temporal_grounding/readable"] == 2 / 6
    saved = json.loads(json.dumps(scores_as_dict(scores)))
    assert scores_from_dict(saved)["temporal_grounding"].forms == {"readable": 2 / 6, "well_formed": 2 / 6}

    del saved["temporal_grounding"]["readable"]  # of a checkpoint that an earlier version wrote
    print_scores(scores_from_dict(saved), scores)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert ["temporal_grounding", "n", "=", "6", "n", "=", "6"] in rows
    assert ["readable", "0.333"] in rows and ["well-formed", "0.333", "0.333"] in rows
    assert max(map(len, lines)) <= 80


def test_a_task_of_the_users_need_not_say_what_is_readable(capsys):
    class Quiet:
        name, part_names = "quiet", ("exact",)

    class Formatted(Quiet):
        part_names = ("format", "exact")

        def score(self, examples, answers):
            return {"format": [float(answer == "x") for answer in answers], "exact": [0.0] * len(answers)}

    class Broken(Quiet):
        def are_readable(self, examples, answers):
            raise RuntimeError("no")

    examples, answers = [grounding("a"), grounding("b")], [Answer("x"), Answer("y")]
    assert answer_forms(Quiet(), examples, answers) == {}  # type: ignore[arg-type]
    assert answer_forms(Formatted(), examples, answers) == {"well_formed": [True, False]}  # type: ignore[arg-type]
    assert answer_forms(Broken(), examples, answers) == {}  # type: ignore[arg-type]
    assert "not known which answers are readable: task quiet: RuntimeError: no" in capsys.readouterr().err


def test_max_examples_takes_the_first_of_each_task(tiny_tokenizer):
    examples = [grounding(name) for name in "abc"]
    scores = score(tiny_tokenizer, examples, {name: ["x"] for name in "ab"}, max_examples=2)
    assert scores["temporal_grounding"].num_examples == 2


def test_the_interval_is_of_the_mean_and_stands_beside_the_score(tiny_tokenizer, capsys):
    """IoU 1 for 20 examples and 0 for 20: standard error 0.5 / sqrt(40) = 0.079, 95 % +- 0.155. All videos differ."""
    right = "<think>x</think><answer>2.00 to 4.00</answer>"
    examples = [grounding(str(i), f"{i}.mp4") for i in range(40)]
    scores = score(tiny_tokenizer, examples, {str(i): [right if i % 2 else "no"] for i in range(40)})
    low, high = scores["temporal_grounding"].intervals["miou"]
    assert (low, high) == pytest.approx((0.5 - 0.155, 0.5 + 0.155), abs=0.02)
    print_scores({}, scores)
    assert f"0.500 ±{(high - low) / 2:.3f}" in capsys.readouterr().out
    one_video = [grounding(str(i)) for i in range(40)]
    assert score(tiny_tokenizer, one_video, {str(i): [right] for i in range(40)})["temporal_grounding"].intervals == {}


@pytest.mark.parametrize("recipe", ["fixed", "paper"])
@pytest.mark.parametrize("task", ALL_TASKS, ids=lambda task: task.task)
def test_no_answer_scores_0_in_every_metric_of_every_task(task, recipe):
    judged = make_tasks(TaskConfig(recipe=recipe), [task.task])[task.task]
    assert set(judged.metrics([task], [""]).values()) == {0.0}
    assert all(values == [0.0] for values in judged.score([task], [""]).values())
    assert answer_forms(judged, [task] * 2, [Answer(""), Answer(judged.target(task))]) == {
        "readable": [False, True],
        # without a glue block no answer of the paper's multiple choice is, see tasks/multiple_choice.py
        "well_formed": [False, (task.task, recipe) != ("multiple_choice", "paper")],
    }


def test_only_means_over_examples_get_per_sample_values():
    class Judged:
        name = "judged"

        def metrics(self, examples, answers):
            recall = sum(map(float, answers)) / len(answers)
            return {"squared": recall**2, "recall": recall, "judged": 1.0}

    examples = [grounding("a"), grounding("b")]
    metrics = Judged().metrics(examples, ["0.0", "1.0"])
    values = per_sample_metrics(Judged(), examples, ["0.0", "1.0"], metrics)  # type: ignore[arg-type]
    assert values == {"recall": [0.0, 1.0], "judged": [1.0, 1.0]}  # 0.5 ** 2 is not the mean of 0 and 1
    assert per_sample_metrics(Judged(), examples, ["0", "1"], metrics | {"judged": 0.5}) == {}  # type: ignore[arg-type]


def test_a_metric_that_one_example_does_not_have_costs_only_its_interval(capsys):
    class Correlated:
        name = "correlated"

        def metrics(self, examples, answers):
            if len(examples) < 2:
                raise ValueError("wanted two examples")
            return {"correlation": 0.5}

    examples = [grounding("a"), grounding("b")]
    assert per_sample_metrics(Correlated(), examples, ["", ""], {"correlation": 0.5}) == {}  # type: ignore[arg-type]
    assert "no intervals: task correlated, one by one: ValueError: wanted two examples" in capsys.readouterr().err


def test_answers_are_drawn_as_eval_says_and_not_as_rollouts_are(tiny_tokenizer, monkeypatch):
    asked = []
    generate = ScriptedEngine.generate

    def recorded(engine, prompts, sampling):
        asked.append(sampling)
        return generate(engine, prompts, sampling)

    monkeypatch.setattr(ScriptedEngine, "generate", recorded)
    builder = PromptBuilder(tiny_tokenizer, make_tasks(TaskConfig()), read)
    rollout = RolloutConfig(top_k=50, top_p=0.9, temperature=0.7, max_new_tokens=9)
    config = Config(rollout=rollout, eval=EvalConfig(repetition_penalty=1.05))
    answer_all(lambda: ScriptedEngine(tiny_tokenizer, {"a": ["x"]}), [grounding("a")], builder, config, SINGLE_PROCESS)
    assert asked == [SamplingParams(1, 9, temperature=0.0, seed=config.train.seed, repetition_penalty=1.05)]


def store(folder, **settings) -> AnswerStore:
    return AnswerStore(folder, {"weights": "w", "temperature": 0.0} | settings, SINGLE_PROCESS)


def test_an_interrupted_evaluation_asks_only_what_is_missing(tmp_path, tiny_tokenizer):
    tasks = make_tasks(TaskConfig())
    builder = PromptBuilder(tiny_tokenizer, tasks, read)
    config = Config(rollout=RolloutConfig(group_size=1, max_batch_rows=1))
    examples = [grounding("a"), grounding("b", "bad.mp4"), grounding("c", "c.mp4")]
    first = ScriptedEngine(tiny_tokenizer, {"a": ["one"]})  # fails at c
    with contextlib.closing(store(tmp_path)) as answers, pytest.raises(ValueError, match="'c' has 0 scripted answers"):
        answer_all(lambda: first, examples, builder, config, SINGLE_PROCESS, answers)
    with (tmp_path / "answers-0.jsonl").open("a") as stream:
        stream.write('{"key": "torn')
    (tmp_path / "answers-7.jsonl").write_text("")  # of another number of ranks
    whole = (tmp_path / "answers-0.jsonl").read_text().splitlines()[0]
    (tmp_path / "answers-8.jsonl").write_text(
        whole.replace("one", "one".replace("e", "a")).replace('"key": "', '"key": "9')
    )

    second = ScriptedEngine(tiny_tokenizer, {"b": ["?"], "c": ["three"]})  # a is not asked again
    with contextlib.closing(store(tmp_path)) as answers:
        assert answers.num_found == 1
        got = answer_all(lambda: second, examples, builder, config, SINGLE_PROCESS, answers)
    assert [(answer.text, answer.finish_reason) for answer in got] == [("one", "stop"), ("", ""), ("three", "stop")]
    assert got[1].failure == "bad.mp4: the file is empty"

    def no_engine():
        raise AssertionError("nothing is left to ask")

    with contextlib.closing(store(tmp_path)) as answers:
        assert answers.num_found == 2  # the unreadable video is tried again, the torn line harms nothing
        readable = [examples[0], examples[2]]
        again = answer_all(no_engine, readable, builder, config, SINGLE_PROCESS, answers)
    assert again == [got[0], got[2]]


def test_the_judge_is_asked_by_rank_0_alone(tmp_path):
    """Of two captions: the events of each (2), recall and precision (4); of the baseline: events (1), recall (2)."""
    with serving(judges_by_words) as server:
        run_ranks(Path(__file__).with_name("judged_ranks.py"), server.url, str(tmp_path / "out"))
        prompts = [request["messages"][0]["content"] for request in server.requests]
    zero, one = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in (0, 1))
    assert zero["scores"] == one["scores"]
    captioning = zero["scores"]["captioning"]
    assert captioning["metrics"] == pytest.approx({"f1": 0.75, "recall": 0.75, "precision": 0.75, "judged": 1.0})
    assert len(prompts) == len(set(prompts)) == 9
    assert zero["without"] == one["without"] == []  # where metrics raise there is no score, and the run goes on


def test_an_answer_belongs_to_question_and_video_contents(tmp_path):
    video = tmp_path / "v.mp4"
    video.write_bytes(b"1")
    key = question_key("when?", grounding("a", str(video)))
    assert key == question_key("when?", grounding("another id", str(video)))
    assert key != question_key("where?", grounding("a", str(video)))
    video.write_bytes(b"22")
    assert key != question_key("when?", grounding("a", str(video)))


def test_answers_of_other_settings_are_refused_until_restart(tmp_path):
    with contextlib.closing(store(tmp_path)) as first:
        first.put("k", Answer("x", "", "stop", 1))
    with pytest.raises(ConfigError, match=r"temperature was 0.0, is 1.0.*another eval.output_dir, or set eval.restart"):
        store(tmp_path, temperature=1.0)
    with contextlib.closing(store(tmp_path)) as same:
        assert same.get("k") == Answer("x", "", "stop", 1)
    settings = {"weights": "w", "temperature": 1.0}
    with contextlib.closing(AnswerStore(tmp_path, settings, SINGLE_PROCESS, restart=True)) as fresh:
        assert fresh.num_found == 0 and fresh.get("k") is None
    (tmp_path / "answers_of.json").unlink()
    with pytest.raises(ConfigError, match="holds answers without"):
        store(tmp_path)


def test_categories_by_axis(capsys):
    def sample(acc: float, **categories: str) -> Sample:
        lists = {axis: values.split("+") for axis, values in categories.items()}
        return Sample("i", "multiple_choice", "v", "q", "", {}, {"acc": acc}, "", "stop", 1, lists)

    samples = [sample(1.0, duration="short", kind="OCR"), sample(0.0, duration="long", kind="OCR"), sample(1.0)]
    samples.append(sample(1.0, duration="short", kind="OCR+[/b]"))
    assert category_means(samples) == {
        "duration": {"long": (1, {"acc": 0.0}), "short": (2, {"acc": 1.0})},
        "kind": {"OCR": (3, {"acc": pytest.approx(2 / 3)}), "[/b]": (1, {"acc": 1.0})},
    }
    print_categories(samples)
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "multiple_choice by duration" in out
        and "short 2 1.000" in out
        and "OCR 3 0.667" in out
        and "[/b] 1 1.000" in out
    )


def test_eval_command_writes_samples_and_goes_on_from_them(tmp_path, monkeypatch, capsys):
    """The packaged model on two synthetic clips: one unreadable; the second run needs no model."""
    data = tmp_path / "data"
    write_dataset(SynthConfig(output_dir=str(data), num_train=1, num_eval=1), show_progress=False)
    rows = [json.loads(line) for line in (data / "eval_grounding.jsonl").read_text().splitlines()]
    bad = rows[0] | {"id": "bad", "video": "nowhere.mp4"}
    (data / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, bad]))
    overrides = [
        f"--data.eval={data / 'eval.jsonl'}",
        f"--train.output_dir={tmp_path / 'run'}",
        "--rollout.max_new_tokens=8",
    ]
    config = load_config("tiny", overrides)

    result = evaluate_command(config)
    samples = read_samples(Path(result["folder"]) / "samples.jsonl")
    assert [sample.id for sample in samples] == [rows[0]["id"], "bad"]
    good, failed = samples
    assert good.answer and good.failure == "" and good.num_tokens == 8 and good.finish_reason == "length"
    assert "nowhere.mp4" in failed.failure and failed.metrics["miou"] == 0.0 and failed.parts["format"] == 0.0
    scores = result["scores"]["temporal_grounding"]
    assert scores["metrics"]["miou"] == pytest.approx((good.metrics["miou"] + 0.0) / 2)
    assert (
        json.loads((Path(result["folder"]) / "scores.json").read_text())["scores"]["temporal_grounding"]["num_bad"] == 1
    )

    monkeypatch.setattr("vcr1_fast.run.run.Run.open_engine", lambda run: ScriptedEngine(run.builder.tokenizer, {}))
    capsys.readouterr()
    assert evaluate_command(config) == result
    assert "going on from 1 answers" in capsys.readouterr().out

    (data / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("vcr1_fast.video.loader.FrameLoader.start", lambda loader: pytest.fail("nothing is to be read"))
    known = evaluate_command(config)["scores"]["temporal_grounding"]
    assert known["metrics"]["miou"] == pytest.approx(good.metrics["miou"]) and known["num_bad"] == 0


def test_eval_command_with_a_prompt_file(tmp_path, monkeypatch):
    """recipe paper: a held-out event as annotated. The file's digest is in scores.json and guards the answers."""
    data, file = tmp_path / "data", tmp_path / "tg.txt"
    write_dataset(SynthConfig(output_dir=str(data), num_train=1, num_eval=1), show_progress=False)
    row = json.loads((data / "eval_grounding.jsonl").read_text().splitlines()[0]) | {"query": "A  dog Barks."}
    (data / "eval.jsonl").write_text(json.dumps(row))
    file.write_text("Find: {event}\n")
    monkeypatch.setattr(
        "vcr1_fast.run.run.Run.open_engine", lambda run: ScriptedEngine(run.builder.tokenizer, {row["id"]: ["1 to 2"]})
    )
    config = load_config(
        "tiny",
        [
            f"--data.eval={data / 'eval.jsonl'}",
            f"--eval.output_dir={tmp_path / 'mine'}",
            f"--task.prompts.temporal_grounding={file}",
            "--task.recipe=paper",
        ],
    )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert evaluate_command(config)["prompts"] == {"temporal_grounding": digest}
    assert json.loads((tmp_path / "mine" / "scores.json").read_text())["prompts"] == {"temporal_grounding": digest}
    assert [s.question for s in read_samples(tmp_path / "mine" / "samples.jsonl")] == ["Find: A  dog Barks."]
    file.write_text("Find this: {event}\n")
    with pytest.raises(ConfigError, match=rf"task.prompts.temporal_grounding was {digest}, is [0-9a-f]{{64}}\)"):
        evaluate_command(config)


def test_eval_command_refuses_a_folder_with_answers_of_other_settings(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    row = {"task": "temporal_grounding", "video": "no.mp4", "query": "x", "duration_s": 4, "intervals": [[1, 2]]}
    (data / "eval.jsonl").write_text(json.dumps(row))
    overrides = [f"--data.eval={data / 'eval.jsonl'}", f"--eval.output_dir={tmp_path / 'mine'}"]
    unreadable = r"none of the 1 held-out samples can be used; the first: .*no\.mp4: no such file"
    with pytest.raises(SampleError, match=unreadable):  # a score of 0 would say nothing about the model
        evaluate_command(load_config("tiny", overrides))
    with pytest.raises(ConfigError, match="max_new_tokens was 96, is 9"):
        evaluate_command(load_config("tiny", [*overrides, "--rollout.max_new_tokens=9"]))
    with pytest.raises(ConfigError, match=r"repetition_penalty was 1\.0, is 1\.05"):
        evaluate_command(load_config("tiny", [*overrides, "--eval.repetition_penalty=1.05"]))
    with pytest.raises(SampleError, match=unreadable):
        evaluate_command(load_config("tiny", [*overrides, "--rollout.max_new_tokens=9", "--eval.restart=true"]))
