"""The endless stream of training prompts: data order -> example -> prompt, bad samples set aside and counted.

Examples that could not be scored come again between the others (`put_back`): after 1, 4, 16 and 64 steps' worth of
further examples, so that neither an outage loses data nor a reward that always fails on some of it takes the run over.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import torch

from vcr1_fast.learner.sharding import World, all_max_int, all_reduce_sum, gather_all
from vcr1_fast.prompts.build import PromptBuilder
from vcr1_fast.prompts.dataset import shard
from vcr1_fast.prompts.difficulty import read_rewards, select_by_reward
from vcr1_fast.prompts.mixture import make_order
from vcr1_fast.prompts.selection import chosen
from vcr1_fast.settings.config import Config
from vcr1_fast.types import Example, Prompt, SampleError
from vcr1_fast.video.quarantine import REASON_NAMES, Quarantine, reason_class
from vcr1_fast.video.source_name import SourceName

NUM_BUILDERS = 4  # prompts built at once
NUM_TRIED = 32  # examples that `sample` looks at
MIN_SAMPLES_TO_JUDGE = 20  # a bad fraction of fewer samples says nothing
WAITS_STEPS = (1, 4, 16, 64)  # before an example comes again after its first, second, ... failure in a row
DRAWN = -1  # where it would be due, while it is being drawn


class TooManyBadSamplesError(SampleError):
    """More of the data is unusable than train.max_bad_sample_frac allows."""


class PromptStream:
    """Hands each rank its share of the next prompts. Its only state is `position`, the items of the data order handed
    out so far, and `again`, the same on all ranks."""

    def __init__(
        self,
        examples: Sequence[Example],
        builder: PromptBuilder,
        quarantine: Quarantine,
        config: Config,
        world: World,
        *,
        needs_target: bool = False,
    ) -> None:
        """`needs_target`: an example whose target cannot become tokens is a bad sample, too.

        Raises ConfigError when the settings leave no example, and for a wrong data.mixture.
        """
        examples, told = chosen(examples, config.data)
        if told and world.is_main:
            print(told, file=sys.stderr)
        if config.data.rewards is not None and config.data.reward_range is not None:
            examples, told = select_by_reward(examples, read_rewards(config.data.rewards), config.data.reward_range)
            if world.is_main:
                print(told, file=sys.stderr)
        self.examples, self.builder, self.quarantine = examples, builder, quarantine
        self.config, self.world = config, world
        self.order = make_order(examples, config.data.mixture, config.train.seed)
        self.position = 0
        self.again: dict[str, tuple[int, int]] = {}  # id -> failures in a row, position at which it comes again
        self._index_of = {example.id: index for index, example in enumerate(examples)}
        self._needs_target = needs_target
        # One torch thread each, as in video/loader.py
        self._pool = ThreadPoolExecutor(NUM_BUILDERS, "build-prompt", initializer=torch.set_num_threads, initargs=(1,))
        self._named: set[int] = set()  # positions not handed out yet whose clips the builder knows of
        # Since this process started, over all ranks:
        self.num_read = self.num_bad = self.num_durations_off = 0
        self.num_bad_by_reason = dict.fromkeys(REASON_NAMES, 0)

    @cached_property
    def digest(self) -> str:
        """Of the examples in their order, wherever their videos are."""
        plain = (_text_of(example) for example in self.examples)
        return blake2b("\n".join(plain).encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()

    @property
    def epoch(self) -> float:
        """Items handed out, in passes through all examples; with `data.mixture` tasks may be ahead of or behind it."""
        return self.position / len(self.examples)

    def metrics(self) -> dict[str, float]:
        """epoch, `epoch/{task}` (passes through the examples of a task), bad_samples, `bad_samples/{reason class}`,
        durations_off (examples whose annotated length is not that of the file; once for each rank that built them)."""
        by_task = {f"epoch/{task}": epoch for task, epoch in self.order.epochs(self.position).items()}
        reasons = {f"bad_samples/{name}": float(n) for name, n in self.num_bad_by_reason.items() if n > 0}
        off = {"durations_off": float(self.num_durations_off)} if self.num_durations_off else {}
        return {"epoch": self.epoch, **by_task, "bad_samples": float(self.num_bad), **reasons, **off}

    def next(self, count: int) -> list[Prompt]:
        """This rank's share of the next `count` items over all ranks, without those that cannot be used.

        Raises TooManyBadSamplesError on every rank alike.
        """
        due = self._take_due(count)
        self._name_next_clips(due, count)
        share = [self.examples[index] for _, index in self._share(due, self.position, count)]
        self.position += count - len(due)
        wanted = [example for example in share if self._reason(example) is None]
        built = list(self._pool.map(self._build, wanted))
        prompts = [result for result in built if isinstance(result, Prompt)]
        for example, result in zip(wanted, built, strict=True):
            if isinstance(result, SampleError):
                self._set_aside(example, result)
        self.quarantine.forget(source for prompt in prompts for source in prompt.example.sources)
        bad = dict.fromkeys(REASON_NAMES, 0.0)
        for example in share:
            reason = self._reason(example)
            if reason is not None:
                bad[reason_class(reason)] += 1.0
        limits = self.builder.limits
        bad["durations_off"] = float(limits.num_off) if limits is not None else 0.0
        bad = all_reduce_sum(bad, self.world)
        self.num_durations_off = int(bad.pop("durations_off"))
        if limits is not None:
            line = limits.report(self.num_durations_off, lambda off: gather_all(off, self.world))
            if line and self.world.is_main:
                print(f"warning: {line}", file=sys.stderr)
        for name, number in bad.items():
            self.num_bad_by_reason[name] += int(number)
        is_first = self.num_read == 0
        self.num_read += count
        self.num_bad = sum(self.num_bad_by_reason.values())
        if is_first and self.num_bad == count:
            self._check_next_ones()
        self._check_bad_fraction()
        return prompts

    def put_back(self, ids: Sequence[str]) -> None:
        """These were handed out and could not be scored: they come again. The same on all ranks."""
        per_step = self.config.train.prompts_per_step
        for example_id in ids:
            num_failures = self.again.pop(example_id, (0, DRAWN))[0] + 1
            if num_failures <= len(WAITS_STEPS):
                due = self.position + per_step * (WAITS_STEPS[num_failures - 1] - 1)
                self.again[example_id] = (num_failures, due)
            elif self.world.is_main:
                print(
                    f"reward failure: {example_id} failed {num_failures} times in a row and is left out until its next "
                    "turn in the data",
                    file=sys.stderr,
                )

    def restore(self, position: int, again: Mapping[str, Sequence[int]]) -> None:
        """Go on where `position` and `again` say; of examples that are not there any more nothing is kept."""
        self.position = position
        self.again = {name: (n, due) for name, (n, due) in again.items() if name in self._index_of}

    def sample(self) -> Prompt | None:
        """One of the prompts that come next on this rank, without taking it; its clip is read twice where no cache
        keeps it. None when none of the next NUM_TRIED can be used: `next` will say why."""
        count = NUM_TRIED * self.world.world_size
        for _, index in self._share([], self.position, count):
            example = self.examples[index]
            built = self._build(example) if self._reason(example) is None else None
            if isinstance(built, Prompt):
                return built
        return None

    def _take_due(self, count: int) -> list[int]:
        """Examples, `count` at most, that come again now. Those of the data's own order then begin anew."""
        due = [name for name, (_, at) in self.again.items() if at != DRAWN and at <= self.position][:count]
        for index in self.order.indices(self.position, count - len(due)):
            if self.examples[index].id not in due:
                self.again.pop(self.examples[index].id, None)
        self.again |= {name: (self.again[name][0], DRAWN) for name in due}
        return [self._index_of[name] for name in due]

    def _share(self, due: Sequence[int], start: int, count: int) -> list[tuple[int, int]]:
        """(position, index of the example) of this rank's part of `count` items: those due, at DRAWN, and then the data
        order from `start` on."""
        in_order = self.order.indices(start, count - len(due))
        items = [*((DRAWN, index) for index in due), *enumerate(in_order, start=start)]
        return shard(items, self.world.rank, self.world.world_size)

    def _name_next_clips(self, due: Sequence[int], count: int) -> None:
        """Tell the builder of this step and the next ones, if these ask for `count` items too; each position once."""
        self._named = {position for position in self._named if position >= self.position}
        share = self._share(due, self.position, count)
        for step in range(1, self.config.video.prefetch_steps + 1):
            share += self._share([], self.position - len(due) + step * count, count)
        coming = []
        for position, index in share:
            if position not in self._named and self._reason(self.examples[index]) is None:
                coming.append(self.examples[index])
            if position != DRAWN:
                self._named.add(position)
        self.builder.read_ahead(coming)

    def _reason(self, example: Example) -> str | None:
        """Why an example is not to be built: what it shows, a part of a video, or its text."""
        reasons = self.quarantine.reasons
        return next((reasons[name] for name in (*example.sources, example.id) if name in reasons), None)

    def _set_aside(self, example: Example, error: SampleError) -> None:
        if error.source not in (example.id, *example.sources):
            # A part of a video that failed does not say that the rest is bad; a picture in a folder is named.
            paths = {source: SourceName.parse(source).path for source in example.sources}
            of_file = [source for source, path in paths.items() if path == error.source]
            of_folder = [source for source, path in paths.items() if error.source.startswith(path)]
            name, *_ = *of_file, *of_folder, *example.sources, example.id
            error = SampleError(name, error.reason if of_file else f"{error.source}: {error.reason}")
        if error.source not in self.quarantine:  # two examples may share a video
            print(f"bad sample: {error}", file=sys.stderr)
        self.quarantine.add(error)

    def _build(self, example: Example) -> Prompt | SampleError:
        try:
            prompt = self.builder.build(example)
            if self._needs_target:
                num_target_tokens = len(self.builder.completion_ids(example))
                if self.builder.limits is not None:
                    self.builder.limits.check_length(prompt, num_target_tokens)
        except SampleError as error:
            return error
        return prompt

    def _check_next_ones(self) -> None:
        """Nothing of the first step can be used: is there anything that can? A collective. Raises
        TooManyBadSamplesError."""
        if all_max_int(int(self.sample() is not None), self.world):
            return  # a step of few prompts may be out of luck
        root = self.config.data.video_root or "the folder of the annotation file"
        raise TooManyBadSamplesError(
            "data.train",
            f"nothing of the first step can be used, nor of the {NUM_TRIED * self.world.world_size} samples after it: "
            f"{self.quarantine.summary()}\nnames of videos that are no whole path start from {root} (data.video_root); "
            "once the cause is mended, data.retry_quarantined=true tries all of them again",
        )

    def _check_bad_fraction(self) -> None:
        limit = self.config.train.max_bad_sample_frac
        if self.num_read >= MIN_SAMPLES_TO_JUDGE and self.num_bad > limit * self.num_read:
            raise TooManyBadSamplesError(
                "data.train",
                f"{self.num_bad} of {self.num_read} samples could not be used, more than "
                f"train.max_bad_sample_frac = {limit}; {self.quarantine.summary()}\n"
                "repair or remove them (all are in quarantine.jsonl of the run), or raise the limit",
            )


def _text_of(example: Example) -> str:
    """All that is asked and known of an example. What most rows do not have is added only where one has it, so that
    checkpoints from before it existed still fit."""
    plain = repr(replace(example, video=Path(example.video).name))
    written, media = getattr(example.truth, "written", ()), tuple(Path(source).name for source in example.media)
    return " ".join([plain, *(str(more) for more in (written, media) if more)])
