"""`vcr1-fast report`: the page of a hand-made run, read by html.parser."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vcr1_fast import cli, report
from vcr1_fast.evaluation.samples import Sample
from vcr1_fast.report.clips import ClipMaker, boxes, choose, said_periods, true_periods
from vcr1_fast.report.curves import chart, smoothed, thinned, time_split
from vcr1_fast.report.data import Said, read_run, score_rows, series_of
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 191 }}",
    "</pre></style><svg onload=alert(1)>",
)
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Tags with their attributes, and the text in each kind of tag; raises where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self._open:
            self.texts.append((self._open[-1], data.strip()))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def write_run(folder: Path, reward: float = 0.0) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {path: some/model}\ntrain: {num_steps: 3, seed: 0}\n")
    records = [
        {"step": 0, "eval/temporal_grounding/miou": 0.25},
        *({"step": i, "reward": reward + i, "step_time": 4.0, "time/rollout_s": 1.0} for i in (1, 2, 3)),
        {"step": 3, "eval/temporal_grounding/miou": 0.5, "kl": None},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_evaluation(run: Path, name: str, samples: list[Sample]) -> None:
    folder = run / "eval" / name
    folder.mkdir(parents=True)
    scores = {"temporal_grounding": {"metrics": {"miou": 0.5}, "intervals": {"miou": [0.4, 0.6]}}}
    (folder / "scores.json").write_text(json.dumps({"model": name, "scores": scores}))
    (folder / "samples.jsonl").write_text("".join(json.dumps(asdict(sample)) + "\n" for sample in samples))


def sample(name: str, score: float) -> Sample:
    fixed = (name, "temporal_grounding", "none.mp4", "when?", "", {"iou": score}, {"miou": score}, "", "stop", 3)
    return Sample(*fixed, truth="1.00 to 3.00", parsed="1 to 2")


def hostile(text: str) -> Sample:
    said = f"<think>{text}</think>{text}"
    texts = {"id": text, "question": text, "answer": said, "parsed": text, "truth": text, "parts": {text: 1.0}}
    return replace(sample("", 0.5), **texts)


def page_of(*arguments: object) -> Page:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *map(str, arguments)])
    assert ended.value.code == 0
    path = arguments[arguments.index("--output") + 1] if "--output" in arguments else f"{arguments[0]}/report.html"
    return Page(Path(str(path)).read_text(encoding="utf-8"))


def test_sections_scores_and_curves_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = page_of(write_run(tmp_path / "a"))
    assert "a/report.html" in capsys.readouterr().out.replace("\n", "")
    assert page.text("h2") == ["Held-out scores", "Curves", "Clips", "Settings that matter"]
    assert [attributes["id"] for attributes in page.of("section")] == ["scores", "curves", "clips", "settings"]
    assert page.text("td")[:5] == ["temporal_grounding", "miou", "0.250", "0.500", "+0.250"]
    assert page.text("h4") == ["reward", "eval/temporal_grounding/miou", "step_time"]
    raw, smooth = ([tag["d"] for tag in page.of("path") if tag["class"] == kind] for kind in ("raw", "smooth"))
    assert raw[0] == "M48.0,126.0 L200.0,67.0 L352.0,8.0"  # rewards 1, 2, 3 between corners (48, 126) and (352, 8)
    assert smooth[0] == "M48.0,126.0 L200.0,96.5 L352.0,67.0"  # their means so far 1, 1.5, 2
    assert "mean reward of all drawn answers, the weighted sum of the parts. Last:" in page.text("figcaption")


def test_nothing_is_loaded_and_no_answer_can_run(tmp_path: Path):
    run = write_run(tmp_path / "a")
    write_evaluation(run, "hostile", [hostile(text) for text in HOSTILE])
    page = page_of(run)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form", "img"} == set()
    names = {name for _, attributes in page.tags for name in attributes}
    assert not any(name.startswith("on") for name in names) and "src" not in names
    assert all(str(tag["href"]).startswith("#") for tag in page.of("a"))
    assert "default-src 'none'" in str(page.of("meta")[1]["content"])
    for text in HOSTILE:
        assert (
            f"<think>{text}</think>{text}" in page.text("pre") and text in page.text("pre") and text in page.text("dd")
        )


def test_two_runs_share_the_axes_and_keep_their_colours(tmp_path: Path):
    runs = write_run(tmp_path / "a"), write_run(tmp_path / "b", reward=2.0)
    (runs[1] / "config.yaml").write_text("model: {path: some/model}\ntrain: {num_steps: 3, seed: 1}\n")
    page = page_of(*runs, "--output", tmp_path / "both.html")
    first, second = [tag["d"] for tag in page.of("path") if tag["class"] == "raw"][:2]
    assert (first, second) == ("M48.0,126.0 L200.0,96.5 L352.0,67.0", "M48.0,67.0 L200.0,37.5 L352.0,8.0")
    assert page.text("h1") == ["a and b"]
    assert page.text("th")[-3:] == ["model.path", "train.num_steps", "train.seed"]
    assert page.text("td")[-6:] == ["some/model", "some/model", "3", "3", "0", "1"]
    assert page.text("span").count("(differs)") == 1


def test_clips_most_improved_best_and_worst(tmp_path: Path):
    run = write_run(tmp_path / "a")
    names = "abcdefghijklmnop"
    write_evaluation(run, "old", [sample(name, 0.5) for name in names])
    write_evaluation(run, "new", [sample(name, i / 16) for i, name in enumerate(names)])
    os.utime(run / "eval" / "old" / "scores.json", (1, 1))
    data = read_run(run)
    chosen = [(title, "".join(said.id for said, _ in pairs)) for title, pairs in choose(data.evaluations, [])]
    assert chosen == [("Most improved", "ponm"), ("Best", "lkji"), ("Worst", "abcd")]
    page = page_of(run)
    assert len(page.of("article")) == 12 and "0.938, before 0.500" in page.text("dd")
    bars = [(tag["class"], tag["x"], tag["width"]) for tag in page.of("rect") if "class" in tag]
    assert bars[:2] == [("truth", "141.3", "218.7"), ("said", "141.3", "109.3")]  # of 3 s, which 328 units stand for


def test_pictures_and_boxes_of_a_real_clip(tmp_path: Path):
    synth = SynthConfig(output_dir=str(tmp_path / "d"), num_train=1, num_eval=1, kinds=("tracking",))
    write_dataset(synth, show_progress=False)
    row = json.loads((tmp_path / "d" / "eval_tracking.jsonl").read_text().splitlines()[0])
    video = next((tmp_path / "d").rglob(Path(row["video"]).name))
    answer, truth = "[[0,0,0.5,1],[0.5,0.25,1,2]]", "[[0,0,1,1]]"
    changes = {"task": "object_tracking", "video": str(video), "parsed": answer, "truth": truth, "times_s": [0.0, 2.0]}
    said = Said(**asdict(replace(sample("t", 0.5), **changes)), score=0.5, score_name="ao")
    clip = ClipMaker().clip(said)
    assert [round(picture.time_s, 1) for picture in clip.pictures] == [0.0, 2.0]
    assert [picture.true_box for picture in clip.pictures] == [(0.0, 0.0, 1.0, 1.0), None]
    assert [picture.said_box for picture in clip.pictures] == [(0.0, 0.0, 0.5, 1.0), (0.5, 0.25, 0.5, 0.75)]
    assert all(
        picture.source.startswith("data:image/jpeg;base64,/9j/") for picture in clip.pictures
    )  # a JPEG's FF D8 FF
    assert clip.true_bars == clip.said_bars == []
    late = ClipMaker(budget_s=-1.0).clip(said)
    assert late.pictures == [] and "the time for reading frames was over" in late.note
    assert "no such file" in ClipMaker().clip(replace(said, video="none.mp4")).note


def test_training_samples_where_nothing_was_evaluated(tmp_path: Path):
    run = write_run(tmp_path / "a")
    (run / "samples").mkdir()
    answer = {"parsed": "", "parts": {}, "num_tokens": 2, "is_sampled": True}
    answers = [answer | {"text": "low", "reward": 0.5}, answer | {"text": "high", "reward": 1.5}]
    answers.append(answer | {"text": "given", "reward": 2.0, "is_sampled": False})
    row = {"step": 10, "id": "a", "task": "t", "video": "v", "question": "q", "truth": "", "times_s": []}
    (run / "samples" / "step_9.jsonl").write_text(json.dumps(row | {"answers": answers[:1]}) + "\n")
    (run / "samples" / "step_10.jsonl").write_text(json.dumps(row | {"answers": answers}) + '\n{"step": 10, "id"\n')
    [said] = read_run(run).trained_on
    assert (said.answer, said.score, said.note) == ("high", 1.5, "the best of 2 answers of step 10")


def test_scores_of_a_result_have_intervals_and_baselines():
    score = {"metrics": {"miou": 0.5}, "intervals": {"miou": [0.4, 0.6]}, "trivial": {"whole_video": {"miou": 0.3}}}
    [row] = score_rows({"before": {}, "after": {"t": score}}, {})
    assert (row.before, row.after, row.before_interval, row.after_interval) == (None, 0.5, None, (0.4, 0.6))
    assert row.trivial == {"whole_video": 0.3}
    damaged = {"metrics": {"miou": None}, "intervals": {"miou": [None, 1]}, "trivial": 3}
    [row] = score_rows({"after": {"t": damaged}}, {})
    assert (row.after, row.after_interval, row.trivial) == (None, None, {})  # what is no number is not known


def test_a_result_of_an_earlier_end_does_not_count(tmp_path: Path):
    run = write_run(tmp_path / "a")  # of 3 steps, in its log 0.5
    result = {"steps": 3, "before": {}, "after": {"temporal_grounding": {"metrics": {"miou": 0.75}}}}
    for steps, wanted in ((3, 0.75), (2, 0.5)):
        (run / "result.json").write_text(json.dumps(result | {"steps": steps}))
        assert [row.after for row in read_run(run).scores] == [wanted]


def test_series_means_and_shares():
    records = [{"step": 1, "a": 1.0}, {"step": 2, "a": None}, {"step": 1, "a": 3}, {"a": 5.0}]
    assert series_of(records) == {"a": [(1, 3.0)]}
    assert smoothed([(1, 1.0), (2, 3.0), (3, 8.0)], window=2) == [(1, 1.0), (2, 2.0), (3, 5.5)]
    assert thinned([(1, 1.0), (2, 3.0), (3, 8.0), (4, 0.0)], limit=2) == [(1.5, 2.0), (3.5, 4.0)]
    assert chart("reward", [[(1, float("nan"))], []]) is None
    logged = {"step_time": [(1, 4.0), (2, 6.0)], "time/rollout_s": [(1, 1.0), (2, 2.0)], "time/eval_s": [(1, 9.0)]}
    spans = time_split(logged)
    assert [(span.name, span.seconds, span.start_frac, span.frac) for span in spans] == [
        ("rollout", 1.5, 0.0, 0.3),
        ("other", 3.5, 0.3, 0.7),
    ]


def test_periods_and_boxes_as_drawn():
    assert true_periods("1.00 to 2.50, 4.00 to 5.00") == [(1.0, 2.5), (4.0, 5.0)]
    assert true_periods("A\n[(1.00, 2.00), (3.00, 4.50)]") == [(1.0, 2.0), (3.0, 4.5)]
    assert said_periods("1 to 2, or 0:10 to 1:05") == [(10.0, 65.0)]  # the last counts, and minutes are read
    assert said_periods("B\n[(1, 2),\n(3, 4)]") == [(1.0, 2.0), (3.0, 4.0)]
    assert said_periods("-1 to 2") == [(0.0, 2.0)]
    assert said_periods("5 to 4") == said_periods("(A)") == said_periods("") == []
    assert boxes("[[0.25,0.5,0.5,0.75], [-1, 0, 2, 1], [1,2]]") == [(0.25, 0.5, 0.25, 0.25), (0.0, 0.0, 1.0, 1.0)]


def test_a_training_outlives_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report.leave_report(tmp_path, {"steps": 3})  # there is no metrics.jsonl
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == 3
    assert capsys.readouterr().err.startswith(
        "warning: no report of the run: ConfigError: there is no metrics.jsonl in"
    )


def test_neither_torch_nor_a_third_run(tmp_path: Path):
    code = "import sys, vcr1_fast.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "a", "b", "c"])
    assert ended.value.code == 2
