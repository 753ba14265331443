"""What one example may ask for: a period that its file has, and a prompt that fits the model. Called by `build`."""

from __future__ import annotations

from collections.abc import Callable

from vcr1_fast.types import Example, Prompt, SampleError
from vcr1_fast.video.source_name import SourceName

# The length in an annotation and that of its file may differ by this much: whichever of the two is more.
DURATION_TOLERANCE_S = 1.0
DURATION_TOLERANCE_FRAC = 0.05

Off = tuple[float, str, float, float]  # seconds between them, file, seconds annotated, seconds there


class PromptLimits:
    """Refuses prompts that a model cannot take and periods that no frame shows; counts lengths that are not the file's.

    Any number of threads may use it.
    """

    def __init__(
        self, max_positions: int, num_answer_tokens: int, max_prompt_tokens: int | None, *, refuses_periods: bool
    ) -> None:
        """`max_positions` of the model, for the prompt and `num_answer_tokens`; `refuses_periods`: recipe fixed."""
        self.max_positions, self.num_answer_tokens = max_positions, num_answer_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self.refuses_periods = refuses_periods
        self.num_reported = 0
        self._off: dict[str, Off] = {}  # example id -> how far off its annotation is

    @property
    def num_off(self) -> int:
        """Examples of this process whose annotated length is not that of the file."""
        return len(self._off)

    def check_length(self, prompt: Prompt, num_answer_tokens: int | None = None) -> None:
        """Raise SampleError when prompt and answer are too long; the default is the longest that may be sampled."""
        num_tokens = len(prompt.token_ids_L)
        num_positions = max(num_tokens, prompt.next_position)  # a video of hours has more positions than tokens
        answer = self.num_answer_tokens if num_answer_tokens is None else num_answer_tokens
        if self.max_prompt_tokens is not None and num_tokens > self.max_prompt_tokens:
            too_long = f"{num_tokens:,} tokens, more than data.max_prompt_tokens = {self.max_prompt_tokens:,}"
        elif num_positions + answer > self.max_positions:
            unit = "tokens" if num_positions == num_tokens else "positions"
            too_long = (
                f"{num_positions:,} {unit} and up to {answer:,} of an answer, more than the {self.max_positions:,} "
                "positions of the model"
            )
        else:
            return
        raise SampleError(
            prompt.example.id,
            f"its prompt is too long: {too_long}; shorten its text, or lower video.total_pixels, "
            "video.max_frames or, of images, video.max_image_pixels",
        )

    def check_duration(self, example: Example, file_s: float) -> None:
        """Compare with `file_s`, the seconds of the file or folder. Raises SampleError for a period past its end.

        Not of a part of a video, nor of images that the annotation itself declares to run at some rate.
        """
        name = SourceName.parse(example.video)
        if file_s <= 0 or name.num_images is not None or name.is_part:
            return
        tolerance_s = max(DURATION_TOLERANCE_S, DURATION_TOLERANCE_FRAC * file_s)
        difference_s = abs(example.duration_s - file_s)
        if tolerance_s < difference_s < float("inf"):
            self._off[example.id] = (difference_s, example.video, example.duration_s, file_s)
        if not self.refuses_periods:
            return
        for start_s, _ in getattr(example.truth, "intervals_s", ()):
            if start_s >= file_s:
                raise SampleError(
                    example.id, f"its period begins at {start_s:g} s, but {example.video} has only {file_s:.2f} s"
                )
        last_s = max(getattr(example.truth, "times_s", ()), default=0.0)
        if last_s > file_s + tolerance_s:
            raise SampleError(
                example.id, f"its period ends at {last_s:g} s, but {example.video} has only {file_s:.2f} s"
            )

    def report(self, num_off: int, gather: Callable[[dict[str, Off]], list[dict[str, Off]]]) -> str:
        """One line whenever `num_off`, the sum over ranks, has doubled since the last; "" in between.

        `gather`, of all ranks' values, is called on every rank or on none.
        """
        if num_off < max(1, 2 * self.num_reported):
            return ""
        self.num_reported = num_off
        off = {name: found for part in gather(dict(self._off)) for name, found in part.items()}
        name = max(off, key=lambda name: off[name])
        _, video, annotated_s, file_s = off[name]
        return (
            f"{len(off)} examples so far have another length than their video by more than {DURATION_TOLERANCE_S:g} s "
            f"and {DURATION_TOLERANCE_FRAC:.0%}; most of all {name}: {annotated_s:g} s annotated, {file_s:.2f} s in "
            f"{video}. Their periods may lie elsewhere: check that the videos are those that were annotated"
        )
