"""Video quality, or any classification of a video: which of a few labels fits? Answer: the label.

Row: {"id", "task", "video", "query", "duration_s", "answer": "low quality"}, and optionally "options", the labels there
are. The query is the whole instruction; VidTAB's names the labels itself.

Rewards, recipe fixed: case, blanks and punctuation around the label do not matter; the format test fits the prompt.
recipe paper: VideoChat-R1 (arXiv 2504.06958, grpo_cls.py) with its defect: without thinking, grpo_cls_nothink.py still
rewards the think block that the prompt no longer asks for.
Held-out scores read answers as its evaluation does (`benchmark_readers.read_label`), in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.annotations import check_counts, label_truth, mean, read_options, read_text
from vcr1_fast.tasks.answer_format import clip, has_paper_format, has_strict_format, tag_blocks
from vcr1_fast.tasks.benchmark_readers import read_label
from vcr1_fast.tasks.choice_format import most_common, plain_text
from vcr1_fast.tasks.prompt_file import Worded, Wording
from vcr1_fast.types import Example, LabelTruth

QUESTIONS = {
    "fixed": "{instruction} {reason} the answer inside <answer></answer>.",
    "paper": "{instruction} {reason}Write the final answer inside <answer></answer>.",
}
PLACEHOLDERS = ("instruction", "labels")
REQUIRED = (("instruction", "query", "query_line"),)


class VideoQuality(Worded):
    """Reward parts: format, and accuracy: 1 for the right label."""

    name = "video_quality"
    needs_video = True
    part_names: tuple[str, ...] = ("format", "accuracy")

    def __init__(self, config: TaskConfig) -> None:
        self.is_paper = config.recipe == "paper"
        self.think = config.think
        self.wording = Wording(config, self.name, QUESTIONS, PLACEHOLDERS, REQUIRED)

    def parse_truth(self, row: Mapping[str, object]) -> LabelTruth:
        """Label and, where the row has options, all labels.

        Raises ValueError for a missing label, malformed options, and a label that is not among the options.
        """
        label = read_text(row, "answer")
        labels = read_options(row) if row.get("options") is not None else ()
        if labels and plain_text(label) not in [plain_text(known) for known in labels]:
            raise ValueError(f"answer is {label!r:.60}, wanted one of the options: {', '.join(labels)}")
        return LabelTruth(label, labels)

    def question_fields(self, example: Example) -> dict[str, str]:
        """instruction: the query (fixed: without blanks around it), and the labels where it does not name them itself.
        labels: "low quality, high quality"; only of rows that give them."""
        asked, labels = example.query if self.is_paper else example.query.strip(), label_truth(example).labels
        if any(label.lower() not in asked.lower() for label in labels):
            asked = f"{asked} Choose one of: {', '.join(labels)}."
        return {"instruction": asked} | ({"labels": ", ".join(labels)} if labels else {})

    def target(self, example: Example) -> str:
        """The completion to learn from: the label, after the example's reasoning."""
        return self.completion(label_truth(example).label, example.reasoning)

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """Parts "format" and "accuracy" of N answers, each 0 or 1.

        format, fixed: one think block (if asked for) and one answer block, with one of the labels where they are known.
        format, paper: the tags alone, the think block always. accuracy, paper: the first answer block equals the label
        without blanks around it and in lower case; fixed: the last one, also without punctuation around it.
        """
        check_counts(len(examples), len(answers))
        texts = [clip(answer) for answer in answers]
        is_formatted, is_right = [], []
        for text, example in zip(texts, examples, strict=True):
            truth, answer = label_truth(example), self._read(text)
            known = [self._plain(label) for label in truth.labels]
            is_label = bool(answer) and (answer in known or not known)
            if self.is_paper:
                is_formatted.append(has_paper_format(text, think=True))
            else:
                is_formatted.append(is_label and has_strict_format(text, self.think))
            is_right.append(answer == self._plain(truth.label))
        return {"format": [float(ok) for ok in is_formatted], "accuracy": [float(ok) for ok in is_right]}

    def metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """acc: the share of right labels, in [0, 1]; an unreadable answer is wrong. ValueError without examples."""
        check_counts(len(examples), len(answers))
        truths = [label_truth(example).label.strip().lower() for example in examples]
        return {"acc": mean([float(read_label(said) == truth) for said, truth in zip(answers, truths, strict=True)])}

    def are_readable(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        """Whether there is a label, one of those that are known."""
        known = [{label.strip().lower() for label in label_truth(example).labels} for example in examples]
        said = [read_label(answer) for answer in answers]
        return [
            label is not None and (label in labels or not labels) for label, labels in zip(said, known, strict=True)
        ]

    def trivial_answers(self, examples: Sequence[Example]) -> dict[str, list[str]]:
        """majority_label: the label that is most often right in these examples."""
        label = most_common(label_truth(ex).label for ex in examples)
        return {"majority_label": [self.completion(label)] * len(examples)}

    def _read(self, text: str) -> str | None:
        """The answer block as labels are compared; None without one."""
        blocks = tag_blocks(text, "answer")
        return self._plain(blocks[0 if self.is_paper else -1]) if blocks else None

    def _plain(self, text: str) -> str:
        return text.strip().lower() if self.is_paper else plain_text(text)
