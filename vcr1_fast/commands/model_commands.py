"""Command lines of the commands that use a model: init, ask, predict, export. Called by cli.py; imports no torch until
one runs."""

from __future__ import annotations

import argparse

from vcr1_fast.settings.io import UsageError, split_config_path


def run_ask(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast ask",
        allow_abbrev=False,
        usage="vcr1-fast ask MODEL VIDEO QUESTION [--task TASK] [--save out.png|out.mp4] [--section.field=value ...]",
        description="Asks a model about a video, greedily by default; the answer is printed as it comes, and a JSON "
        "line says what was read in it. Settings are those of the run that made the model, and those given here.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a Hugging Face folder or id, a run, a checkpoint, `tiny`, `tiny3`"
    )
    parser.add_argument("video", metavar="VIDEO", help="a file, or a folder of images; or one image: .jpg, .png, ...")
    for kind in ("video", "image"):
        parser.add_argument(
            f"--{kind}", dest=f"{kind}s", action="append", default=[], metavar="FILE",
            help=f"shown beside VIDEO; once for each; where <{kind}> stands in QUESTION, if it does",
        )  # fmt: skip
    parser.add_argument("question", metavar="QUESTION", help="with --task the query alone, such as 'a dog barks'")
    parser.add_argument("--task", help="such as temporal_grounding; without it the question goes as it is")
    parser.add_argument("--option", action="append", default=[], metavar="TEXT", help="of a choice; once for each")
    parser.add_argument("--box", metavar="X0,Y0,X1,Y1", help="start of a track, corners as fractions of the frame")
    parser.add_argument("--times", metavar="S,S,...", help="seconds to give boxes at; default: 8, evenly from 0 on")
    parser.add_argument(
        "--save", metavar="OUT", help="draw it: .png: spans below a strip of frames, or boxes on frames; .mp4: the clip"
    )
    parser.add_argument("--max-new-tokens", metavar="N", help="short for --eval.max_new_tokens=N")
    parser.add_argument("--temperature", metavar="T", help="short for --eval.temperature=T")
    options, overrides = parser.parse_known_args(tokens)
    for name in ("max_new_tokens", "temperature"):
        if getattr(options, name) is not None:
            overrides.append(f"--eval.{name}={getattr(options, name)}")
    lists = {"box": _numbers("--box", options.box), "times_s": _numbers("--times", options.times)}
    if lists["box"] is not None and len(lists["box"]) != 4:
        raise UsageError(f"--box is {options.box!r}, wanted four numbers such as 0.1,0.2,0.4,0.5")
    from vcr1_fast.commands.ask import Asked, ask_command

    asked = (options.model, options.video, options.question, options.task, tuple(options.option))
    more = {"videos": tuple(options.videos), "images": tuple(options.images)}
    return ask_command(Asked(*asked, **lists, save=options.save, **more), overrides)


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{name} is {text!r}, wanted numbers such as 0.1,0.2") from None


def run_predict(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast predict",
        allow_abbrev=False,
        usage="vcr1-fast predict FILE [CONFIG] --output OUT.jsonl [--model.path=MODEL] [--section.field=value ...]",
        description='Answers rows without labels: {"id", "task", "video", "query"}, and what the task needs to ask: '
        '"options", "box" and "times_s" or "duration_s". Writes {"id", "answer", "parsed"} lines. Started again it '
        "goes on from the answers that it has.",
        epilog="Settings as in `vcr1-fast eval --help-all`; the default are those of the run that made the model.",
    )
    parser.add_argument("rows", metavar="FILE", help="JSONL, JSON, CSV or parquet")
    parser.add_argument("--output", metavar="OUT.jsonl", required=True, help="file to write")
    options, rest = parser.parse_known_args(tokens)
    path, overrides = split_config_path(rest)
    from vcr1_fast.commands.predict import predict_command

    return predict_command(options.rows, options.output, path, overrides)


def run_export(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast export",
        description="Writes a checkpoint of a run as a folder that from_pretrained loads; LoRA adapters are merged.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT|RUN", help="a step's folder; of a run its newest one")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights; default: checkpoint.export_dtype of the run"
    )
    parser.add_argument("--no-merge", action="store_true", help="the adapter alone, as PEFT reads it")
    parser.add_argument("--push", metavar="REPO", help="upload it to this repository of the Hugging Face Hub")
    options = parser.parse_args(tokens)
    from vcr1_fast.commands.export import export_command

    return export_command(
        options.checkpoint, options.out, options.dtype, merges=not options.no_merge, repo=options.push
    )


def run_init(tokens: list[str]) -> object:
    parser = argparse.ArgumentParser(
        prog="vcr1-fast init",
        allow_abbrev=False,
        usage="vcr1-fast init OUT.yaml --data FILE... --model PATH [--gpus N] [--eval FILE...] [--videos FOLDER]",
        description="Writes a commented configuration for data of your own that fits into so many GPUs of 80 GB. Looks "
        "at the annotation files and at the model's config.json; videos and weights are not opened.",
    )
    parser.add_argument("out", metavar="OUT.yaml", help="file to write; it must not exist")
    parser.add_argument("--data", metavar="FILE", nargs="+", required=True, help="annotation files to train on")
    parser.add_argument("--eval", metavar="FILE", nargs="+", default=[], help="held-out annotation files")
    parser.add_argument("--model", metavar="PATH", required=True, help="folder, id of the Hub, `tiny` or `tiny3`")
    parser.add_argument("--gpus", metavar="N", type=int, help="0: a CPU; default: those of this machine")
    parser.add_argument("--videos", metavar="FOLDER", help="of the videos; default: that of each annotation file")
    options = parser.parse_args(tokens)
    if options.gpus is not None and options.gpus < 0:
        raise UsageError(f"--gpus is {options.gpus}, wanted 0 or more")
    from vcr1_fast.commands.init import init_command

    return init_command(options.out, options.data, options.eval, options.model, options.gpus, options.videos)
