"""`vcr1-fast ask`: one question about a video, an image or several to a model, its answer as it comes, what was read
in it, a picture."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TextStreamer

from vcr1_fast.evaluate import eval_sampling
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.run.named_model import named_model
from vcr1_fast.run.run import Run, open_run
from vcr1_fast.settings.config import Config, ConfigError, DataConfig
from vcr1_fast.settings.io import UsageError, load_settings
from vcr1_fast.tasks import make_tasks
from vcr1_fast.tasks.task import Task
from vcr1_fast.tasks.unlabelled import Parsed, PlainQuestion, read_answer, unlabelled
from vcr1_fast.types import Example, SampleError
from vcr1_fast.video.draw import boxes_on_frames, read_at, strip, strip_times_s, write_png
from vcr1_fast.video.draw_clip import box_mark, span_mark, write_clip
from vcr1_fast.video.image_header import SUFFIXES
from vcr1_fast.video.read import open_reader
from vcr1_fast.video.reader import Probe, Reader
from vcr1_fast.video.source_name import IMAGE


@dataclass(frozen=True, slots=True)
class Asked:
    """The command line."""

    model: str
    video: str
    question: str
    task: str | None = None  # None: the question goes as it is
    options: tuple[str, ...] = ()
    box: tuple[float, ...] | None = None
    times_s: tuple[float, ...] | None = None
    save: str | None = None  # PNG or MP4 file
    videos: tuple[str, ...] = ()  # shown beside `video`, which may be an image
    images: tuple[str, ...] = ()

    @property
    def is_about_image(self) -> bool:
        return self.video.lower().endswith(SUFFIXES) and Path(self.video).expanduser().is_file()

    @property
    def files(self) -> tuple[list[str], list[str]]:
        """Absolute paths of images and of videos. Raises ConfigError where there is none."""
        images = [self.video, *self.images] if self.is_about_image else [*self.images]
        videos = [*self.videos] if self.is_about_image else [self.video, *self.videos]
        for kind, names in (("image", images), ("video", videos)):
            for name in names:
                if not Path(name).expanduser().exists():
                    raise ConfigError(f"there is no {kind} {name}")
        paths = [[str(Path(name).expanduser().absolute()) for name in names] for names in (images, videos)]
        return paths[0], paths[1]


def ask_command(asked: Asked, overrides: list[str]) -> dict[str, Any]:
    """Print the answer while it is drawn; returns what the last line is to say.

    overrides: settings such as --video.max_frames=64, on top of those that the model's run had.
    Raises UsageError, ConfigError, or SampleError for a video that cannot be read.
    """
    save = Path(asked.save).expanduser() if asked.save else None
    if save and (save.suffix.lower() not in (".png", ".mp4") or not save.absolute().parent.is_dir()):
        raise UsageError(f"--save is {asked.save}, wanted a name that ends in .png or .mp4, in a folder that exists")
    if save and save.exists() and save.samefile(Path(asked.video).expanduser()):
        raise UsageError(f"--save is {asked.save}, which is the video itself: give another name")
    images, videos = asked.files
    if save and asked.is_about_image:
        raise UsageError(f"--save draws on a video, and {asked.video} is an image: leave it out")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer
        model = named_model(asked.model)
    of_model = [*overrides, f"--model.path={model.path}"]  # its defaults where nothing else is said
    config = model.put_into(_settings(load_settings(Config, model.settings, of_model)))
    tasks = {PlainQuestion.name: PlainQuestion(config.task), **make_tasks(config.task, judge=config.judge)}
    with contextlib.closing(open_reader(replace(config.video, reader="pyav"))) as reader:
        probe = None if asked.is_about_image else reader.probe(videos[0])
        example = _example(asked, probe, tasks, config)
        if asked.images or len(images + videos) > 1 or probe is None:
            media = (*(image + IMAGE for image in images), *videos)
            example = replace(example, video=videos[0] if videos else "", media=media)
        text, finish_reason = _answer(config, example, tasks)
        parsed = read_answer(example, text, config.task)
        result: dict[str, Any] = {"parsed": parsed, "finish_reason": finish_reason}
        result |= {"duration_s": round(probe.duration_s, 3)} if probe else {}
        if save and probe:
            result["saved"] = str(save) if _draw(save, example, parsed, reader, probe) else None
    return result


def _settings(config: Config) -> Config:
    """Those of an evaluation of one video, which needs no workers and no annotation files."""
    video = replace(config.eval_video, num_workers=0)
    return replace(config, data=DataConfig(), video=video, rollout=replace(config.rollout, engine="local"))


def _example(asked: Asked, probe: Probe | None, tasks: dict[str, Task], config: Config) -> Example:
    name = asked.task or PlainQuestion.name
    if name not in tasks:
        raise UsageError(f"there is no task {name!r}; they are {', '.join(tasks)}")
    if getattr(tasks[name], "needs_video", False) and (probe is None or asked.videos):
        raise UsageError(f"task {name} asks about one video: name one, and no more")
    row: dict[str, object] = {"duration_s": probe.duration_s} if probe else {}
    row |= {"options": list(asked.options)} if asked.options else {}
    row |= {"box": list(asked.box)} if asked.box else {}
    row |= {"times_s": list(asked.times_s)} if asked.times_s else {}
    try:
        truth = unlabelled(tasks[name], config.task).parse_truth(row)
    except (ValueError, SampleError) as error:
        hints = {"options": '--option "a cat" --option "a dog"', "box": "--box 0.1,0.2,0.4,0.5", "times": "--times 0,1"}
        hint = next((hint for key, hint in hints.items() if str(error).startswith(key)), "")
        raise UsageError(f"task {name}: {error}" + (f"; give it by {hint}" if hint else "")) from None
    video, duration_s = (probe.path, probe.duration_s) if probe else ("", math.inf)
    return Example("question", name, video, asked.question, duration_s, truth, is_held_out=True)


def _answer(config: Config, example: Example, tasks: dict[str, Task]) -> tuple[str, str]:
    """Text and finish reason; printed as it comes."""
    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):  # the head of every run
            run: Run = stack.enter_context(open_run(config, "eval"))
            run.builder.tasks = tasks
            prompt = run.builder.build(example)
            engine = stack.enter_context(contextlib.closing(run.open_engine()))
        assert isinstance(engine, LocalEngine), "rollout.engine is local"
        streamer = TextStreamer(run.builder.tokenizer, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        engine.on_token = _put(streamer)
        completion = engine.generate([prompt], eval_sampling(config))[0][0]
        streamer.end()
    if completion.finish_reason == "length":
        print(f"cut off after {completion.num_tokens} tokens: raise --max-new-tokens", file=sys.stderr)
    return completion.text, completion.finish_reason


def _put(streamer: TextStreamer) -> Callable[[Tensor], None]:
    return lambda token_B: streamer.put(token_B.cpu())


def _draw(file: Path, example: Example, parsed: Parsed | None, reader: Reader, probe: Probe) -> bool:
    """Boxes on their frames or a strip with the spans, or the whole clip with them. False, with a line, where there are
    neither."""
    has_boxes, is_clip = bool(parsed and "boxes" in parsed), file.suffix.lower() == ".mp4"
    if not parsed or not (has_boxes or ("intervals" in parsed and probe.duration_s > 0)):
        print("no picture: no span and no boxes were read in the answer", file=sys.stderr)
        return False
    given = getattr(example.truth, "boxes", (None,))[0]
    if is_clip:
        of_boxes = (parsed.get("boxes", ()), parsed.get("times_s", ()), given)
        mark = box_mark(*of_boxes) if has_boxes else span_mark(parsed["intervals"], probe.duration_s)
        with contextlib.redirect_stdout(sys.stderr):  # its progress
            write_clip(file, reader, probe, mark)
    elif has_boxes:
        write_png(boxes_on_frames(read_at(reader, probe, parsed["times_s"]), parsed["boxes"], given), file)
    else:
        frames = read_at(reader, probe, strip_times_s(probe.duration_s))
        write_png(strip(frames, parsed["intervals"], probe.duration_s), file)
    return True
