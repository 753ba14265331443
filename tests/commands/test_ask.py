"""One question to the packaged model: what is printed, what is drawn, what a wrong command line is answered with."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from tests.command_line import run
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.synth.config import SynthConfig
from vcr1_fast.synth.dataset import write_dataset, write_mp4
from vcr1_fast.types import Completion
from vcr1_fast.video.draw import GIVEN, SPAN, write_png
from vcr1_fast.video.draw_clip import PLAYHEAD

TRACK = "0.10,0.20,0.50,0.60"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    kinds = ("grounding", "tracking")
    write_dataset(SynthConfig(output_dir=str(folder), num_train=1, num_eval=1, kinds=kinds), show_progress=False)
    return folder


def png(file: Path) -> np.ndarray:
    with av.open(str(file)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


def test_a_span_is_streamed_read_and_drawn(clips, tmp_path, capsys, monkeypatch):
    pieces: list[int] = []
    generate = LocalEngine.generate

    def counted(self, *arguments):
        show = self.on_token
        self.on_token = lambda token_B: (pieces.append(len(token_B)), show(token_B))
        return generate(self, *arguments)

    monkeypatch.setattr(LocalEngine, "generate", counted)
    [row] = [json.loads(line) for line in (clips / "eval_grounding.jsonl").read_text().splitlines()]
    picture = tmp_path / "span.png"
    tokens = ("ask", "tiny", str(clips / row["video"]), row["query"], "--task", "temporal_grounding")
    code, out, err = run(capsys, *tokens, "--save", str(picture))
    answer, last = out.splitlines()
    result = json.loads(last)
    [[start_s, end_s]] = result["parsed"]["intervals"]
    assert code == 0 and answer.startswith("<think>0 ") and f"<answer>{start_s:.2f} to {end_s:.2f}</answer>" in answer
    assert (result["duration_s"], result["finish_reason"], result["saved"]) == (8.0, "stop", str(picture))
    assert "model tiny in float32" in err  # the head of every run, which is no answer
    assert set(pieces) == {1} and len(pieces) > 20  # a token a step
    rgb = png(picture)
    assert rgb.shape == (160 + 24, 8 * 160, 3)  # square clips
    is_span = (rgb[-1] == SPAN).all(axis=1)
    assert is_span.nonzero()[0].tolist() == list(range(round(start_s / 8 * 1280), round(end_s / 8 * 1280)))


def test_boxes_are_asked_for_at_their_times_and_drawn(clips, tmp_path, capsys, monkeypatch):
    """The packaged model's boxes are not always readable, so its answer is put in place."""
    asked: list[str] = []
    said = "<think></think><answer>[[0.1,0.2,0.5,0.6],[0.25,0.25,0.75,0.75]]</answer>"

    def generate(self, prompts, sampling):
        asked.append(self.tokenizer.decode(prompts[0].token_ids_L, skip_special_tokens=True))
        return [[Completion(prompts[0].token_ids_L[:1], prompts[0].token_ids_L[:1].float(), "stop", said)]]

    monkeypatch.setattr(LocalEngine, "generate", generate)
    [row] = [json.loads(line) for line in (clips / "eval_tracking.jsonl").read_text().splitlines()]
    picture = tmp_path / "boxes.png"
    tokens = ("ask", "tiny", str(clips / row["video"]), "red circle", "--task", "object_tracking", "--box", TRACK)
    code, out, _ = run(capsys, *tokens, "--times", "0,4.5", "--save", str(picture))
    assert code == 0 and "At 0.00 s its box is [0.10,0.20,0.50,0.60]" in asked[0]
    assert "its boxes at 0.00, 4.50 s as a list of 2 such boxes" in asked[0]
    boxes = [[0.1, 0.2, 0.5, 0.6], [0.25, 0.25, 0.75, 0.75]]
    assert json.loads(out.splitlines()[-1])["parsed"] == {"boxes": boxes, "times_s": [0.0, 4.5]}
    rgb = png(picture)
    assert rgb.shape == (160, 2 * 160, 3)
    assert rgb[50, 16].tolist() == list(GIVEN)  # the start box lies over the answer's
    assert rgb[40, 160 + 80].tolist() == rgb[119, 160 + 80].tolist() == list(SPAN)  # top and bottom: 0.25, 0.75 of 160
    assert rgb[80, 160 + 40].tolist() == rgb[80, 160 + 119].tolist() == list(SPAN) != rgb[80, 160 + 80].tolist()


def test_a_plain_question_goes_as_it_is_and_ends_where_it_is_told_to(clips, tmp_path, capsys, monkeypatch):
    asked: list[str] = []
    generate = LocalEngine.generate

    def noted(self, prompts, sampling):
        asked.append(self.tokenizer.decode(prompts[0].token_ids_L, skip_special_tokens=True))
        kinds.append([patches.kind for patches in prompts[0].media])
        return generate(self, prompts, sampling)

    monkeypatch.setattr(LocalEngine, "generate", noted)
    kinds: list[list[str]] = []
    video = next((clips / "videos").glob("*.mp4"))
    picture = tmp_path / "none.png"
    tokens = ("ask", "tiny", str(video), "is it (A) red?", "--max-new-tokens", "3", "--save", str(picture))
    code, out, err = run(capsys, *tokens)
    assert code == 0 and "user\nis it (A) red?" in asked[0] and "<answer>" not in asked[0]
    result = json.loads(out.splitlines()[-1])
    assert (result["parsed"], result["finish_reason"], result["saved"]) == (None, "length", None)
    assert "cut off after 3 tokens: raise --max-new-tokens" in err and "no picture: no span and no boxes" in err
    assert not picture.exists()
    still = tmp_path / "still.png"
    write_png(np.zeros((84, 84, 3), np.uint8), still)
    about_image = ("ask", "tiny", str(still), "is <image> in <video>?", "--video", str(video), "--max-new-tokens", "1")
    code, out, err = run(capsys, *about_image)
    assert code == 0 and "user\nis  in ?" in asked[1] and "duration_s" not in json.loads(out.splitlines()[-1]), err
    assert kinds == [["video"], ["image", "video"]]


@pytest.mark.parametrize(
    ("tokens", "code", "message"),
    [
        (["tiny", "no.mp4", "q"], 1, "there is no video no.mp4"),
        (["tiny", "bad.mp4", "q"], 1, "bad.mp4: is not a video file"),
        (["nowhere", "bad.mp4", "q"], 1, "nowhere does not exist: give the folder of a run, one of its checkpoints,"),
        ([".", "bad.mp4", "q"], 1, ". holds no model and no checkpoint"),
        (
            ["tiny", "{clip}", "q", "--task=grunding"],
            2,
            "there is no task 'grunding'; they are plain, temporal_groundi",
        ),
        (
            ["tiny", "{clip}", "q", "--task=multiple_choice"],
            2,
            "options is missing, wanted a list of 2 to 26 texts; give",
        ),
        (["tiny", "{clip}", "q", "--task=object_tracking"], 2, "give it by --box 0.1,0.2,0.4,0.5"),
        (["tiny", "{clip}", "q", "--task=object_tracking", "--box=0,0,1,x"], 2, "--box is '0,0,1,x', wanted numbers"),
        (["tiny", "{clip}", "q", "--task=object_tracking", "--box=0,0,1"], 2, "--box is '0,0,1', wanted four numbers"),
        (["tiny", "{clip}", "q", "--task=object_tracking", "--box=0,0,2,1"], 2, "box 0 is [0.0, 0.0, 2.0, 1.0], want"),
        (["tiny", "{clip}", "q", "--image=no.png"], 1, "there is no image no.png"),
        (["tiny", "{clip}", "q", "--video={clip}", "--task=object_tracking"], 2, "asks about one video: name one"),
        (["tiny", "bad.mp4", "q", "--save=a.gif"], 2, "--save is a.gif, wanted a name that ends in .png or"),
        (["tiny", "bad.mp4", "q", "--video.max_fames=3"], 2, "did you mean video.max_frames?"),
        (["tiny", "bad.mp4", "q", "--temperature=hot"], 2, "eval.temperature is 'hot' on the command line"),
    ],
)
def test_what_cannot_be_asked_is_one_line(clips, tmp_path, monkeypatch, capsys, tokens, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.mp4").write_text("no video")
    clip = str(next((clips / "videos").glob("*.mp4")))
    got, out, err = run(capsys, "ask", *(token.format(clip=clip) for token in tokens))
    assert (got, out, err.count("\n")) == (code, "", 1), err
    assert message in err


def test_predict_answers_rows_without_labels_once(clips, tmp_path, capsys, monkeypatch):
    [row] = [json.loads(line) for line in (clips / "eval_grounding.jsonl").read_text().splitlines()]
    video = str(clips / row["video"])
    rows = [
        {"id": "when", "task": "temporal_grounding", "video": video, "query": row["query"]},
        {"id": "which", "task": "multiple_choice", "video": video, "query": "what?", "options": ["a cat", "a dog"]},
        {"id": "lost", "task": "temporal_grounding", "video": "lost.mp4", "query": "x"},
        {"id": "where", "task": "object_tracking", "video": video, "query": "x"},
    ]
    file, output = tmp_path / "rows.jsonl", tmp_path / "said.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = ("predict", str(file), "--output", str(output), "--model.path=tiny", "--video.num_workers=0")
    code, out, err = run(capsys, *tokens)
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == {"output": str(output), "n": 4, "num_failed": 2, "model": "tiny"}
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["when", "which", "lost", "rows:4"]  # an unusable row by its place
    [[start_s, end_s]] = lines[0]["parsed"]["intervals"]
    assert f"<answer>{start_s:.2f} to {end_s:.2f}</answer>" in lines[0]["answer"]
    assert lines[1]["answer"] and "failure" not in lines[1]
    assert "lost.mp4: no such file" in lines[2]["failure"] and lines[2]["parsed"] is None
    assert "box is missing" in lines[3]["failure"] and "bad row: " in err

    monkeypatch.setattr(LocalEngine, "generate", lambda *_: pytest.fail("answered already"))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))  # the lost one would be tried again
    code, out, _ = run(capsys, *tokens)
    assert code == 0 and "going on from 2 answers" in out
    assert [json.loads(line) for line in output.read_text().splitlines()] == lines[:2]

    file.write_text(json.dumps(rows[3]) + "\n")
    code, out, _ = run(capsys, *tokens)
    assert code == 1 and json.loads(out.splitlines()[-1])["num_failed"] == 1  # not one answer


def test_predict_names_a_folder_that_is_not_there(capsys, tmp_path):
    code, out, err = run(capsys, "predict", "rows.jsonl", "--output", str(tmp_path / "no" / "said.jsonl"))
    assert (code, out, err.count("\n")) == (2, "", 1) and "does not exist: make that folder" in err


def frames_of(file: Path) -> tuple[list[np.ndarray], list[float], str]:
    """[H, W, 3] and the seconds of each frame, and the codec."""
    with av.open(str(file)) as container:
        frames = [*container.decode(video=0)]
        images = [frame.to_ndarray(format="rgb24") for frame in frames]
        return images, [float(frame.time or 0) for frame in frames], container.streams.video[0].codec_context.name


def is_near(rgb: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Which pixels are that colour but for what encoding does to it."""
    return np.abs(rgb.astype(int) - colour).max(axis=-1) < 40


@pytest.fixture
def says(monkeypatch):
    """Puts an answer in the place of the model's."""

    def put(said: str) -> None:
        def generate(self, prompts, sampling):
            ids = prompts[0].token_ids_L[:1]
            return [[Completion(ids, ids.float(), "stop", said)]]

        monkeypatch.setattr(LocalEngine, "generate", generate)

    return put


def test_a_clip_is_drawn_with_its_times_and_size(clips, tmp_path, capsys, says):
    says("<think></think><answer>2.0 to 6.0</answer>")
    [row] = [json.loads(line) for line in (clips / "eval_grounding.jsonl").read_text().splitlines()]
    video, drawn = clips / row["video"], tmp_path / "span.mp4"
    tokens = ("ask", "tiny", str(video), row["query"], "--task", "temporal_grounding", "--save")
    code, out, _ = run(capsys, *tokens, str(drawn))
    assert code == 0 and json.loads(out.splitlines()[-1])["saved"] == str(drawn)
    assert [path.name for path in tmp_path.iterdir()] == ["span.mp4"]
    before, times_before_s, _ = frames_of(video)
    images, times_s, codec = frames_of(drawn)
    assert (codec, len(images)) == ("h264", len(before)) and times_s == pytest.approx(times_before_s, abs=1e-5)
    assert images[0].shape == before[0].shape
    height_px, width_px, _ = images[0].shape
    kept = slice(0, height_px - max(height_px // 12, 6) - 8)  # above the bar, which the codec smears a little
    for time_s in (0.5, 4.0, 7.5):
        index = times_s.index(time_s)
        bottom = images[index][height_px - 4]
        of_span = is_near(bottom, SPAN).nonzero()[0] / width_px  # 2 to 6 of 8 seconds
        assert of_span.min() == pytest.approx(0.25, abs=0.03) and of_span.max() == pytest.approx(0.75, abs=0.03)
        of_line = is_near(bottom, PLAYHEAD).nonzero()[0] / width_px
        assert of_line.size and of_line.mean() == pytest.approx(time_s / 8, abs=0.03)
        assert np.abs(images[index][kept].astype(int) - before[index][kept]).mean() < 4

    code, _, err = run(capsys, *tokens, str(video))
    assert code == 2 and "which is the video itself: give another name" in err


def test_boxes_follow_their_instants_in_a_clip(tmp_path, capsys, says):
    says("<think></think><answer>[[0.1,0.2,0.5,0.6],[0.25,0.25,0.75,0.75]]</answer>")
    grey, drawn = tmp_path / "grey.mp4", tmp_path / "boxes.mp4"
    write_mp4(grey, iter([np.full((240, 320, 3), 128, np.uint8)] * 12), 320, 240, 2)
    asked = ("red circle", "--task", "object_tracking", "--box", TRACK, "--times", "0,4", "--save", str(drawn))
    assert run(capsys, "ask", "tiny", str(grey), *asked)[0] == 0
    images, times_s, _ = frames_of(drawn)
    assert times_s == [i / 2 for i in range(12)]
    for image, time_s in zip(images, times_s, strict=True):
        is_second = time_s >= 2  # half way between the two instants
        on_row = is_near(image[130], SPAN if is_second else GIVEN).nonzero()[0].tolist()  # the given one lies on top
        assert on_row == ([80, 81, 238, 239] if is_second else [32, 33, 158, 159]), time_s
