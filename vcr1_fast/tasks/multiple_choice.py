"""Multiple choice: which of the given answers to a question is right? Answer: its letter.

Row: {"id", "task", "video", "query", "duration_s", "options": ["a cat", ...], "answer": "C"}, and optionally "scoring",
the benchmark whose rule finds the letter for the held-out score (`benchmark_readers.CHOICE_RULES`).

Rewards, recipe fixed: the letter is read with care, so that a word such as "Because" is not taken for B.
recipe paper: VideoChat-R1 (arXiv 2504.06958, grpo_qa.py) with its parser and its defect: the format test is the one of
grounded questions and demands a glue block that the prompt never asks for, so it is practically always 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vcr1_fast.settings.config import TaskConfig
from vcr1_fast.tasks.annotations import (
    check_counts,
    choice_truth,
    mean,
    read_options,
    read_true_letter,
    written_options,
)
from vcr1_fast.tasks.answer_format import clip
from vcr1_fast.tasks.answers_batch import have_format, read_choices, read_paper_choices
from vcr1_fast.tasks.benchmark_readers import CHOICE_RULES, read_letter
from vcr1_fast.tasks.choice_format import (
    PAPER_NUM_LETTERS,
    marked_options,
    most_common,
)
from vcr1_fast.tasks.glue_format import has_paper_glue_format
from vcr1_fast.tasks.prompt_file import Worded, Wording, one_line
from vcr1_fast.types import ChoiceTruth, Example

ASKED = {  # the question and its options, without a word on how to answer
    "fixed": "{question_line} Options: {options_line}.",
    "paper": 'Watch the video and answer the question "{question}". Choose one of the options {options_list}.',
}
QUESTIONS = {
    "fixed": ASKED["fixed"] + " {reason} the letter as <answer>A</answer>.",
    "paper": ASKED["paper"] + " {reason}Write the letter of the option inside <answer></answer>.",
}
OPTIONS = ("options", "options_dots", "options_line", "options_list")
PLACEHOLDERS = ("question", "question_line", *OPTIONS)
REQUIRED = (("question", "question_line", "query", "query_line"), OPTIONS)


class MultipleChoice(Worded):
    """Reward parts: format, and accuracy: 1 for the right letter."""

    name = "multiple_choice"
    part_names: tuple[str, ...] = ("format", "accuracy")

    def __init__(self, config: TaskConfig) -> None:
        self.is_paper = config.recipe == "paper"
        self.think = config.think
        self.wording = Wording(config, self.name, QUESTIONS, PLACEHOLDERS, REQUIRED)

    def parse_truth(self, row: Mapping[str, object]) -> ChoiceTruth:
        """Letter and options, see `read_choice_row`."""
        return read_choice_row(row, self.is_paper)

    def question_fields(self, example: Example) -> dict[str, str]:
        """See `choice_fields`."""
        return choice_fields(example)

    def target(self, example: Example) -> str:
        """The completion to learn from: the letter, after the example's reasoning."""
        return self.completion(choice_truth(example).letter, example.reasoning)

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, list[float]]:
        """Parts "format" and "accuracy" of N answers, each 0 or 1.

        format, fixed: one think block (if asked for), one answer block, and one of the letters in it. format, paper:
        the tags and the valid glue block of a grounded answer. accuracy, fixed: the last answer block; paper:
        the first.
        """
        check_counts(len(examples), len(answers))
        letters = read_letters(examples, answers, self.is_paper)
        if self.is_paper:
            is_formatted = [has_paper_glue_format(clip(answer), self.think) for answer in answers]
        else:
            have_tags = have_format(answers, "fixed", self.think)
            is_formatted = [ok and letter is not None for ok, letter in zip(have_tags, letters, strict=True)]
        return {"format": [float(ok) for ok in is_formatted], "accuracy": accuracy(letters, examples)}

    def metrics(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """acc: the share of right letters, by the row's rule; an unreadable answer is wrong. In [0, 1].

        Raises ValueError without examples.
        """
        return {"acc": mean(accuracy(said_letters(examples, answers), examples))}

    def are_readable(self, examples: Sequence[Example], answers: Sequence[str]) -> list[bool]:
        return [letter is not None for letter in said_letters(examples, answers)]

    def trivial_answers(self, examples: Sequence[Example]) -> dict[str, list[str]]:
        """majority_letter: the letter that is most often right in these examples."""
        letter = most_common(choice_truth(ex).letter for ex in examples)
        return {"majority_letter": [self.completion(letter)] * len(examples)}


def read_choice_row(row: Mapping[str, object], is_paper: bool, scoring: str = "videomme") -> ChoiceTruth:
    """Options, right letter and rule of an annotation row; letters before options ("(A) a cat") are taken off.

    paper: the options are also kept as the file writes them, letters and blanks included, for the prompt to hold them
    byte for byte as the original's does. `scoring`: the rule of a row that names none.
    Raises ValueError for missing or malformed options, for a letter beyond them and for an unknown rule; paper: for
    more than 7 options.
    """
    options = read_options(row)
    if is_paper and len(options) > PAPER_NUM_LETTERS:
        raise ValueError(
            f"there are {len(options)} options, wanted at most {PAPER_NUM_LETTERS}: "
            "task.recipe paper reads no letter after G"
        )
    rule = row.get("scoring", scoring)
    if not isinstance(rule, str) or rule not in CHOICE_RULES:
        raise ValueError(f"scoring is {rule!r:.60}, wanted one of {', '.join(CHOICE_RULES)}")
    written = written_options(row) if is_paper else ()
    is_usual = list(written) == marked_options(options)
    letter = read_true_letter(row, len(options))
    return ChoiceTruth(letter, options, written=() if is_usual else written, scoring=rule)


def choice_fields(example: Example) -> dict[str, str]:
    """Values of OPTIONS and of the question: as annotated, or in one line and with a question mark where it has no end.

    options: "(A) a cat", a line each; options_line: with a blank between them; options_list: as Python writes a list of
    them. options_dots: "A. a cat", a line each.
    """
    truth, query = choice_truth(example), one_line(example.query)
    shown = list(truth.written) or marked_options(truth.options)
    return {
        "question": example.query,
        "question_line": query if query.endswith((".", "?", "!", ":")) else f"{query}?",
        "options": "\n".join(shown),
        "options_dots": "\n".join(marked_options(truth.options, "{}. {}")),
        "options_line": " ".join(shown),
        "options_list": str(shown),
    }


def said_letters(examples: Sequence[Example], answers: Sequence[str]) -> list[str | None]:
    """The letter of each answer by the rule of its row; for scores."""
    check_counts(len(examples), len(answers))
    truths = [choice_truth(example) for example in examples]
    return [read_letter(said, truth.options, truth.scoring) for said, truth in zip(answers, truths, strict=True)]


def read_letters(examples: Sequence[Example], answers: Sequence[str], is_paper: bool) -> list[str | None]:
    """The letter each answer names, for rewards, None where it cannot be read.

    paper: in the first answer block, fixed: in the last one.
    """
    if is_paper:
        return read_paper_choices(answers)
    return read_choices(answers, [choice_truth(example).options for example in examples])


def accuracy(letters: Sequence[str | None], examples: Sequence[Example]) -> list[float]:
    """1 for each right letter."""
    return [float(letter == choice_truth(ex).letter) for letter, ex in zip(letters, examples, strict=True)]
