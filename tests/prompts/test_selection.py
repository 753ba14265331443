"""Which examples are trained on, and the draw by difficulty: counts by hand, and what the bell must give."""

import json
from collections import Counter

import pytest

import vcr1_fast.cli as cli
from vcr1_fast.prompts.selection import chosen, draw_by_difficulty
from vcr1_fast.settings.config import ConfigError, DataConfig
from vcr1_fast.types import Example, IntervalTruth


def example(name: str, query: str = "a dog barks", duration_s: float = 8.0) -> Example:
    return Example(name, "temporal_grounding", f"{name}.mp4", query, duration_s, IntervalTruth(((1.0, 2.0),)))


def test_what_the_settings_leave(tmp_path):
    pool = [
        *(example("a"), example("b", duration_s=4.9), example("c", duration_s=500.0), example("d", duration_s=501.0)),
        *(
            example("e", "He may (Hear), then nod."),
            example("f", "w " * 6),
            example("g"),
            example("h", duration_s=float("inf")),
        ),
    ]
    settings = DataConfig(duration_range_s=(5, 500), max_query_words=5, excluded_words=("hear", "Sound"))
    kept, told = chosen(pool, settings)
    assert [ex.id for ex in kept] == ["a", "c", "g", "h"]
    assert told == (
        "data.train: 4 of 8 examples are trained on; left out: 2 by data.duration_range_s, 1 by data.excluded_words, "
        "1 by data.max_query_words"
    )
    assert chosen(pool, DataConfig()) == (pool, "")
    listed = tmp_path / "only.jsonl"
    listed.write_text('{"id": "g", "miou": 0.1}\n\n{"id": "b"}\n')
    kept, told = chosen(pool, DataConfig(only=str(listed)))
    assert [ex.id for ex in kept] == ["b", "g"] and told.endswith("left out: 6 not in data.only")
    listed.write_text('{"id": "z"}\n{"id": "b"}')
    with pytest.raises(ConfigError, match=r"names 1 of 2 ids that data\.train does not have, such as 'z'"):
        chosen(pool, DataConfig(only=str(listed)))
    with pytest.raises(ConfigError, match=r"0 of 8 examples.*nothing is left"):
        chosen(pool, DataConfig(duration_range_s=(600, 700), max_query_words=1))


@pytest.mark.parametrize("line", ["{", "[]", '{"id": 1}', "null", "[" * 3000])
def test_a_line_without_an_id_is_named(line, tmp_path):
    listed = tmp_path / "only.jsonl"
    listed.write_text('{"id": "a"}\n' + line)
    with pytest.raises(ConfigError, match=r"only\.jsonl:2 is"):
        chosen([example("a")], DataConfig(only=str(listed)))


def test_the_draw_follows_the_bell_whatever_the_pool_is():
    """Two bins: 0.0 holds 9 times as many rows as 0.5. Their weights are e^(-0.03125) / n and e^(-2.53125) / n', so
    that of the first few drawn 12.2 rows are of the first bin for one of the second."""
    scores = {f"{i}": 0.0 for i in range(9000)} | {f"x{i}": 0.5 for i in range(1000)}
    drawn = Counter(score for _, score in draw_by_difficulty(scores, 1000, 0.05, 0.2, seed=0))
    assert drawn[0.0] / drawn[0.5] == pytest.approx(12.18, rel=0.35)
    again = draw_by_difficulty(scores, 50, 0.05, 0.2, seed=3)
    assert again == draw_by_difficulty(scores, 50, 0.05, 0.2, seed=3) != draw_by_difficulty(scores, 50, 0.05, 0.2, 4)
    assert len({name for name, _ in again}) == 50
    assert draw_by_difficulty({"a": 1.0, "b": 0.0}, 2, 0.05, 0.2, 0) == [("a", 1.0), ("b", 0.0)]
    with pytest.raises(ConfigError, match="3 rows are to be drawn of 2, of which 2 have a weight above 0"):
        draw_by_difficulty({"a": 1.0, "b": 0.0}, 3, 0.05, 0.2, 0)
    with pytest.raises(ConfigError, match="of 2, of which 1 have a weight"):
        draw_by_difficulty({"a": 1.0, "b": 0.0}, 2, 0.0, 0.01, 0)


def run(*tokens: object) -> object:
    with pytest.raises(SystemExit) as ended:
        cli.main(["select", *map(str, tokens)])
    return ended.value.code


def test_the_command_reads_rewards_and_samples(tmp_path, capsys):
    answers, out = tmp_path / "rewards.jsonl", tmp_path / "out.jsonl"
    answers.write_text("".join(f'{{"id": "r{i}", "reward": {i / 10}}}\n' for i in range(10)))
    assert run(answers, "--target=3", f"--output={out}", "--metric=reward", "--mean=0.3", "--std=0.05") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(rows) == 3 and {"id": "r3", "reward": 0.3} in rows
    assert (result["num_rows"], result["num_drawn"]) == (10, 3)
    assert result["mean_reward"] == pytest.approx(sum(row["reward"] for row in rows) / 3)
    sample = {"task": "t", "video": "v", "question": "q", "answer": "a", "parts": {}, "failure": "", "num_tokens": 1}
    lines = [sample | {"id": f"s{i}", "finish_reason": "stop", "metrics": {"miou": i / 4}} for i in range(5)]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(answers, "--target=5", f"--output={out}") == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"id": f"s{i}", "miou": i / 4} for i in range(5)
    ]
    assert run(answers, "--target=2", f"--output={out}", "--metric=f1") == 1
    assert "no sample of" in (told := capsys.readouterr().err) and "they have miou" in told
    answers.write_text(json.dumps(lines[0] | {"metrics": {"miou": 1.5}}))
    assert run(answers, "--target=1", f"--output={out}") == 1
    assert "miou of 's0' is 1.5, wanted a score in [0, 1]" in capsys.readouterr().err
