"""The local engine against stock forwards of the Hugging Face model at the same ids with explicit positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

from tests.conftest import make_example, make_patches, stock_inputs
from tests.rollout.sampled_policy import vision_ids
from vcr1_fast.prompts.positions import mrope_positions
from vcr1_fast.rollout.engine import Quota, is_done
from vcr1_fast.rollout.grouped_cache import GroupedCache
from vcr1_fast.rollout.local_engine import LocalEngine, _Batch
from vcr1_fast.rollout.sampling import uniforms
from vcr1_fast.types import Completion, MediaKind, Patches, Prompt, SamplingParams

Model = Qwen2_5_VLForConditionalGeneration
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


@pytest.fixture
def prompts(make_prompt: Callable[..., Prompt]) -> list[Prompt]:
    """Three lengths, three video sizes, three frame rates."""
    return [
        make_prompt((4, 4, 6), "what?", 1.0, 1),
        make_prompt((2, 8, 8), "when does the person open the door?", 0.7, 2),
        make_prompt((7, 4, 4), "who is it, and where", 2.5, 3),
    ]


@pytest.fixture
def engine(tiny_model: Model, tiny_tokenizer: PreTrainedTokenizerFast) -> LocalEngine:
    return LocalEngine(tiny_model, tiny_tokenizer)


@torch.no_grad()
def full_logits(model: Model, prompt: Prompt, completion_ids_R: Tensor, banned: Sequence[int] | None = None) -> Tensor:
    """[R, V] float32: a stock forward of the one row [prompt | completion], positions by the rule on that whole row.
    `banned` ids, by default those of pictures, have -inf."""
    ids_L = torch.cat([prompt.token_ids_L, completion_ids_R])
    seconds = [patches.second_per_grid_s for patches in prompt.media]
    pads = (model.config.video_token_id, 2, model.config.image_token_id)
    positions_3L = mrope_positions(ids_L, prompt.grids, seconds, *pads)
    shown = {name: value.to(model.device) for name, value in stock_inputs(prompt, model.dtype).items()}
    logits_LV = model(
        input_ids=ids_L[None].to(model.device), position_ids=positions_3L[:, None].to(model.device), **shown
    ).logits[0]
    logits_LV[:, vision_ids(model.config) if banned is None else banned] = -torch.inf
    return logits_LV[prompt.token_ids_L.numel() - 1 : -1].float().cpu()


def logprob_error(model: Model, prompt: Prompt, completion: Completion, temperature: float = 1.0) -> float:
    """Largest difference between the reported log-probs and those of the stock forward."""
    ids_R = completion.token_ids_R
    logprob_RV = (full_logits(model, prompt, ids_R) / temperature).log_softmax(-1)
    return float((completion.logprobs_R - logprob_RV.gather(1, ids_R[:, None])[:, 0]).abs().max())


def ids(groups: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[c.token_ids_R.tolist() for c in group] for group in groups]


@pytest.mark.parametrize(
    ("active", "want"),
    [
        # one prompt still needs all 4 rows and every prompt needs one: nothing can be dropped, nothing may move
        ([[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 1]], []),
        ([[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0]], [[5, 6], [8, 9]]),  # a prompt goes; 8 stays with a finished row
        ([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], [[4, 5, 6, 7]]),
    ],
)
def test_dropping_rows_keeps_equally_many_of_each_prompt(active, want):
    batch = _Batch(12, 4, (9,))
    batch.add([0 if is_active else 9 for group in active for is_active in group])
    assert batch.compact() == want
    rows = [row for group in want for row in group] or list(range(12))
    assert batch.rows == rows and batch.group_size == len(rows) // (len(want) or 3)
    batch.add([1] * len(rows))
    assert batch.tokens == [[0, 1] if is_active else [9] for group in active for is_active in group]
    assert batch.num_active == sum(map(sum, active))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_log_probs_are_those_of_separate_rows(make_tiny_model, tiny_tokenizer, prompts, temperature, tied):
    engine = LocalEngine(make_tiny_model(tied=tied), tiny_tokenizer)
    stock = make_tiny_model(tied=tied)
    groups = engine.generate(prompts, SamplingParams(4, 12, temperature, seed=5))
    assert [len(group) for group in groups] == [4, 4, 4]
    for prompt, group in zip(prompts, groups, strict=True):
        assert len({tuple(c.token_ids_R.tolist()) for c in group}) > 1
        for completion in group:
            assert completion.logprobs_R.dtype == torch.float32 and completion.token_ids_R.dtype == torch.int64
            assert logprob_error(stock, prompt, completion, temperature) < 1e-4


def test_prompts_of_several_videos_images_or_text_alone_are_answered_as_by_the_stock_model(
    make_tiny_model, tiny_tokenizer, prompts
):
    """Together, in one chunk with a prompt of one video; and text alone in a chunk without anything to see."""
    ids, seed = tiny_tokenizer.get_vocab(), iter(range(9))

    def shown(grid: tuple[int, int, int], kind: MediaKind) -> tuple[str, Patches]:
        patches = dataclasses.replace(make_patches(grid, float(kind == "video"), next(seed)), kind=kind)
        return f"<|vision_start|>{f'<|{kind}_pad|>' * patches.num_tokens}<|vision_end|>", patches

    def asked(*parts: str | tuple[str, Patches]) -> Prompt:
        media = tuple(part[1] for part in parts if not isinstance(part, str))
        text = "".join(part if isinstance(part, str) else part[0] for part in parts)
        token_ids = torch.tensor(tiny_tokenizer(text)["input_ids"])
        seconds = [patches.second_per_grid_s for patches in media]
        pads = (ids["<|video_pad|>"], 2.0, ids["<|image_pad|>"])
        grids = [patches.grid_thw for patches in media]
        return Prompt(make_example(text), token_ids, mrope_positions(token_ids, grids, seconds, *pads), media)

    first, second = shown((4, 4, 4), "video"), shown((5, 4, 6), "video")
    text = asked("what is a dog?")
    mixed = [asked(first, " or ", second, "?"), text, asked("is ", shown((1, 4, 6), "image"), " in ", first, "?")]
    engine, stock = LocalEngine(make_tiny_model(), tiny_tokenizer), make_tiny_model()
    for chunk in ([*mixed, prompts[0]], [text]):
        for prompt, group in zip(chunk, engine.generate(chunk, SamplingParams(2, 6, seed=3)), strict=True):
            for completion in group:
                assert logprob_error(stock, prompt, completion) < 1e-4


@pytest.mark.parametrize(("num_copies", "group_size"), [(1, 8), (6, 1)])  # rows are dropped; whole prompts are dropped
def test_rows_that_end_early_leave_the_others_right(
    make_tiny_model, tiny_tokenizer, prompts, monkeypatch, num_copies, group_size
):
    # Near-uniform over 288 ids, two of which end a row: half of the rows are done after about 100 tokens. 160 tokens
    # also make the buffers of new tokens grow twice.
    kept: list[tuple[int, int]] = []
    original = GroupedCache.keep

    def spy(cache: GroupedCache, row_PG: Tensor) -> None:
        kept.append((row_PG.shape[0], row_PG.numel()))
        original(cache, row_PG)

    monkeypatch.setattr(GroupedCache, "keep", spy)
    engine = LocalEngine(make_tiny_model(head_scale=0.05), tiny_tokenizer)
    stock = make_tiny_model(head_scale=0.05)
    asked = prompts * num_copies
    groups = engine.generate(asked, SamplingParams(group_size, 160, seed=1))
    num_prompts, num_rows = kept[-1]
    assert num_rows < len(asked) * group_size and (group_size > 1 or num_prompts < len(asked))
    lengths = [c.num_tokens for group in groups for c in group]
    assert min(lengths) < 100 and max(lengths) > 130
    for prompt, group in zip(asked, groups, strict=True):
        assert max(logprob_error(stock, prompt, completion) for completion in group) < 1e-4


def test_greedy_is_the_argmax_of_the_full_forward(make_tiny_model, tiny_tokenizer, prompts):
    engine, stock = LocalEngine(make_tiny_model(), tiny_tokenizer), make_tiny_model()
    banned = [tiny_tokenizer.get_vocab()[name] for name in VISION_TOKENS]
    groups = engine.generate(prompts, SamplingParams(2, 10, temperature=0.0))
    for prompt, (first, second) in zip(prompts, groups, strict=True):
        logits_RV = full_logits(stock, prompt, first.token_ids_R)
        logits_RV[:, banned] = -torch.inf
        assert torch.equal(first.token_ids_R, logits_RV.argmax(-1))
        assert torch.equal(first.token_ids_R, second.token_ids_R)
        assert logprob_error(stock, prompt, first) < 1e-4


def test_tokens_follow_the_seed_and_not_the_chunks(make_tiny_model, tiny_tokenizer, prompts):
    model = make_tiny_model(head_scale=0.3)
    sampling = SamplingParams(4, 30, seed=7)
    whole = LocalEngine(model, tiny_tokenizer).generate(prompts, sampling)
    assert ids(LocalEngine(model, tiny_tokenizer).generate(prompts, sampling)) == ids(whole)
    bounds = [{"max_batch_rows": rows} for rows in (1, 4, 8, 11)]  # one prompt at a time, one, two, two
    for bound in (*bounds, {"max_batch_tokens": 1}):
        engine = LocalEngine(model, tiny_tokenizer, **bound)
        assert ids(engine.generate(prompts, sampling)) == ids(whole)
    other = LocalEngine(model, tiny_tokenizer).generate(prompts, dataclasses.replace(sampling, seed=8))
    assert ids(other) != ids(whole)
    first, second = engine.generate([prompts[0], prompts[0]], sampling)
    assert ids([first]) != ids([second])  # each prompt of a call has random numbers of its own
    assert engine.generate([], sampling) == []


def test_vision_ids_are_never_drawn_nor_count_in_the_log_prob(make_tiny_model, tiny_tokenizer, prompts):
    banned = [tiny_tokenizer.get_vocab()[name] for name in VISION_TOKENS]
    model, stock = make_tiny_model(), make_tiny_model()
    for either in (model, stock):  # what the head likes best are now exactly the banned ids
        with torch.no_grad():
            either.lm_head.weight[banned] *= 4
    groups = LocalEngine(model, tiny_tokenizer).generate(prompts, SamplingParams(8, 12, seed=2))
    drawn = {token for group in ids(groups) for row in group for token in row}
    assert not drawn & set(banned)
    banned_mass = full_logits(stock, prompts[0], groups[0][0].token_ids_R, banned=()).softmax(-1)[:, banned].sum(-1)
    assert banned_mass.max() > 0.5  # otherwise this test would say nothing
    assert logprob_error(stock, prompts[0], groups[0][0]) < 1e-4


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|endoftext|>"])
def test_a_stop_id_ends_the_row_and_is_its_last_id(make_tiny_model, tiny_tokenizer, prompts, stop):
    model, stop_id = make_tiny_model(), tiny_tokenizer.get_vocab()[stop]
    prompt = prompts[0]
    free = LocalEngine(model, tiny_tokenizer).generate([prompt], SamplingParams(1, 8, temperature=0.0))[0][0]
    assert free.finish_reason == "length" and free.num_tokens == 8
    third = int(free.token_ids_R[2])
    assert third not in free.token_ids_R[:2].tolist()
    with torch.no_grad():  # the head now says the stop id, a hair louder, where it said that token
        model.lm_head.weight[stop_id] = model.lm_head.weight[third] * 1.001
    ended = LocalEngine(model, tiny_tokenizer).generate([prompt], SamplingParams(1, 8, temperature=0.0))[0][0]
    assert ended.finish_reason == "stop"
    assert ended.token_ids_R.tolist() == [*free.token_ids_R[:2].tolist(), stop_id]
    assert ended.num_tokens == ended.logprobs_R.numel() == 3
    assert ended.text == tiny_tokenizer.decode(free.token_ids_R[:2].tolist()) and stop not in ended.text


def transformers_probabilities(
    model: Model, prompt: Prompt, completion: Completion, banned: list[int], penalty: float, top_k: int
) -> Tensor:
    """[R, V]: what `generate` of transformers would draw each token of the completion from, without the banned ids."""
    logits_RV = full_logits(model, prompt, completion.token_ids_R)
    rows: list[Tensor] = []
    for index in range(completion.num_tokens):
        before = torch.cat([prompt.token_ids_L, completion.token_ids_R[:index]])[None]
        penalised = RepetitionPenaltyLogitsProcessor(penalty)(before, logits_RV[index : index + 1])  # pyright: ignore[reportArgumentType]
        penalised[:, banned] = -torch.inf
        rows.append(TopKLogitsWarper(top_k)(before, penalised)[0])  # pyright: ignore[reportArgumentType]
    return torch.stack(rows).softmax(-1)


def test_top_k_and_penalty_are_those_of_transformers_while_rows_end(make_tiny_model, tiny_tokenizer, prompts):
    """Each token is the one whose slice of the cumulative distribution holds the engine's random number."""
    engine = LocalEngine(make_tiny_model(head_scale=0.05), tiny_tokenizer)
    stock = make_tiny_model(head_scale=0.05)
    banned = [tiny_tokenizer.get_vocab()[name] for name in VISION_TOKENS]
    sampling = SamplingParams(4, 120, seed=3, top_k=200, repetition_penalty=1.5)
    groups = engine.generate(prompts, sampling)
    lengths = [c.num_tokens for group in groups for c in group]
    assert sorted(lengths)[len(lengths) // 2] < 120  # half of the rows are gone before the end: they were moved up
    for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        uniform_SG = uniforms(3, number, 120, 4)
        for place, completion in enumerate(group):
            prob_RV = transformers_probabilities(stock, prompt, completion, banned, 1.5, 200).double()
            drawn_R1 = completion.token_ids_R[:, None]
            own_R, reached_R = prob_RV.gather(1, drawn_R1)[:, 0], prob_RV.cumsum(1).gather(1, drawn_R1)[:, 0]
            uniform_R = uniform_SG[: completion.num_tokens, place]
            assert own_R.min() > 0
            assert (uniform_R < reached_R + 1e-5).all() and (uniform_R > reached_R - own_R - 1e-5).all()
            assert logprob_error(stock, prompt, completion) < 1e-4  # before all that


def test_a_penalty_counts_what_an_interrupted_answer_began_with(make_tiny_model, tiny_tokenizer, prompts):
    model = make_tiny_model()
    sampling = SamplingParams(1, 16, temperature=0.0, repetition_penalty=1.3)
    whole = LocalEngine(model, tiny_tokenizer).generate(prompts, sampling)
    free = LocalEngine(model, tiny_tokenizer).generate(prompts, dataclasses.replace(sampling, repetition_penalty=1.0))
    assert ids(whole) != ids(free)
    begun = [[Completion(c.token_ids_R[:6], c.logprobs_R[:6], "aborted")] for [c] in whole]
    assert ids(LocalEngine(model, tiny_tokenizer).generate(prompts, sampling, begun)) == ids(whole)


def test_tower_and_prefill_run_once_for_a_prompt(engine, prompts):
    tower_rows: list[int] = []
    decoder_shapes: list[tuple[int, int]] = []

    def on_tower(_module: object, arguments: tuple[Tensor, ...], _output: object) -> None:
        tower_rows.append(arguments[0].shape[0])

    def on_decoder(_module: object, _arguments: object, output: Tensor) -> None:
        decoder_shapes.append((output.shape[0], output.shape[1]))

    engine.model.model.visual.register_forward_hook(on_tower)
    engine.model.model.language_model.norm.register_forward_hook(on_decoder)
    engine.generate(prompts, SamplingParams(4, 6, temperature=1.0))
    assert tower_rows == [sum(p.media[0].values_PC.shape[0] for p in prompts)]
    longest = max(p.token_ids_L.numel() for p in prompts)
    assert decoder_shapes == [(3, longest)]


def test_completions_can_be_trained_on(engine, prompts):
    [[completion]] = engine.generate(prompts[:1], SamplingParams(1, 3))
    weight = torch.randn(288, 4, requires_grad=True)
    embedded = torch.nn.functional.embedding(completion.token_ids_R, weight)
    (embedded.sum(-1) * completion.logprobs_R).sum().backward()  # inference tensors would raise here
    assert weight.grad is not None


def test_a_prompt_that_does_not_fit_its_video_is_an_error(engine, prompts):
    swapped = dataclasses.replace(prompts[0], media=prompts[1].media)
    with pytest.raises(ValueError, match=r"'what\?:1' has 24 placeholders, but its grids \[\(2, 8, 8\)\] stand for 32"):
        engine.generate([swapped], SamplingParams(1, 2))


def test_broken_weights_are_reported(engine, prompts):
    with torch.no_grad():
        engine.model.model.language_model.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        engine.generate(prompts, SamplingParams(2, 3))


def test_settings_and_models_that_do_not_fit_are_errors(tiny_model, tiny_tokenizer, prompts):
    with pytest.raises(ValueError, match=r"sampling\.top_p is 0"):
        LocalEngine(tiny_model, tiny_tokenizer).generate(prompts, SamplingParams(1, 1, top_p=0.0))
    tiny_model.config.video_token_id = 5
    with pytest.raises(ValueError, match=r"<\|video_pad\|> is 263, but the model's video_token_id is 5"):
        LocalEngine(tiny_model, tiny_tokenizer)


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_weights_answer_as_their_own_model(make_tiny_model, tiny_tokenizer, prompts, tied):
    engine, source = LocalEngine(make_tiny_model(tied=tied), tiny_tokenizer), make_tiny_model(seed=1, tied=tied)
    sampling = SamplingParams(2, 8, seed=3)
    before = engine.generate(prompts, sampling)
    assert engine.policy_version == 0
    engine.load_weights(
        source.named_parameters(), policy_version=4
    )  # a tied head comes once, under the embedding's name
    assert engine.policy_version == 4
    after = engine.generate(prompts, sampling)
    assert ids(after) != ids(before)
    assert ids(after) == ids(
        LocalEngine(make_tiny_model(seed=1, tied=tied), tiny_tokenizer).generate(prompts, sampling)
    )
    assert logprob_error(source, prompts[0], after[0][0]) < 1e-4
    if tied:
        weights = {n: w for n, w in source.state_dict().items() if n != "model.language_model.embed_tokens.weight"}
        engine.load_weights(weights.items(), policy_version=5)  # the head's name stands for both


def test_bad_loads_are_errors_that_name_the_weight(engine, make_tiny_model):
    good = dict(make_tiny_model(seed=1).named_parameters())
    norm = "model.language_model.norm.weight"
    with pytest.raises(ValueError, match="weight 'norm' is none of the engine's"):
        engine.load_weights({"norm": good[norm]}.items(), 1)
    with pytest.raises(ValueError, match=rf"weight '{norm}' has shape \(63,\), wanted \(64,\)"):
        engine.load_weights({norm: good[norm][:63]}.items(), 1)
    with pytest.raises(ValueError, match=f"weight '{norm}' was given twice"):
        engine.load_weights([(norm, good[norm])] * 2, 1)
    with pytest.raises(ValueError, match=r"1 weights are missing, the first is 'lm_head\.weight'"):
        engine.load_weights([(n, w) for n, w in good.items() if n != "lm_head.weight"], 1)
    assert engine.policy_version == 0


def test_only_a_load_after_a_whole_one_may_be_partial(engine, make_tiny_model):
    good = dict(make_tiny_model(seed=1).named_parameters())
    unfrozen = {name: weight for name, weight in good.items() if "visual" not in name}
    with pytest.raises(ValueError, match=r"weights are missing, the first is 'model\.visual"):
        engine.load_weights(unfrozen.items(), 1)
    engine.load_weights(good.items(), 1)
    engine.load_weights(unfrozen.items(), 2)
    with pytest.raises(ValueError, match="no load may be empty"):
        engine.load_weights([], 3)
    assert engine.policy_version == 2
    with pytest.raises(ValueError, match="weights are missing"):  # after an error it must be whole again
        engine.load_weights(unfrozen.items(), 3)


def begun_by(engine: LocalEngine, prompts: list[Prompt], sampling: SamplingParams, num_tokens: int):
    """What a call gives that is interrupted once so many tokens of its first chunk are drawn."""
    left = iter(range(num_tokens - 1, -1, -1))
    engine.on_token = lambda _: None if next(left, 1) else engine.interrupt()
    begun = engine.generate(prompts, sampling)
    engine.on_token = None
    return begun


@pytest.mark.parametrize("max_batch_rows", [4, 256])  # prompts one by one, or together
def test_an_interrupted_call_goes_on_to_the_same_tokens(engine, prompts, max_batch_rows):
    engine.max_batch_rows = max_batch_rows
    sampling = SamplingParams(4, 12, seed=3)
    want = engine.generate(prompts, sampling)
    begun = begun_by(engine, prompts, sampling, 6)
    aborted = [c for group in begun for c in group if c.finish_reason == "aborted"]
    assert {c.num_tokens for c in aborted} <= {0, 6} and any(c.num_tokens == 6 for c in aborted)
    assert any(c.num_tokens == 0 for c in aborted) == (max_batch_rows == 4)  # prompts that were not begun
    got = engine.generate(prompts, sampling, begun)
    assert ids(got) == ids(want)
    assert [[c.finish_reason for c in group] for group in got] == [[c.finish_reason for c in group] for group in want]
    for group, wanted in zip(got, want, strict=True):
        for completion, other in zip(group, wanted, strict=True):
            assert torch.allclose(completion.logprobs_R, other.logprobs_R, atol=1e-5)


@pytest.mark.parametrize("max_batch_rows", [4, 256])
def test_a_call_comes_back_when_its_quota_is_met(engine, prompts, request, max_batch_rows):
    engine.max_batch_rows = max_batch_rows
    more_often_V = torch.zeros(engine.model.config.text_config.vocab_size)
    more_often_V[list(engine._stop_ids)] = 4.0
    ends_soon = engine.model.lm_head.register_forward_hook(lambda _head, _args, logits_BV: logits_BV + more_often_V)
    request.addfinalizer(ends_soon.remove)  # the model is shared
    sampling = SamplingParams(2, 160, seed=3)
    want = engine.generate(prompts, sampling)
    assert all(c.finish_reason == "stop" for group in want for c in group)
    longest = [max(c.num_tokens for c in group) for group in want]
    assert len(set(longest)) == len(prompts) > 2  # one after the other is done
    begun = engine.generate(prompts, sampling, None, Quota(1))
    together = longest[: max_batch_rows // 2]  # prompts that are answered at a time
    assert [is_done(group) for group in begun] == [length == min(together) for length in longest]
    last = longest.index(max(longest))
    order = [last, *[i for i in range(len(prompts)) if i != last]]
    required = engine.generate([prompts[i] for i in order], sampling, None, Quota(1, num_required=1))
    assert is_done(required[0])  # although others were done before it
    got = engine.generate(prompts, sampling, begun, Quota(len(prompts)))
    assert ids(got) == ids(want)


def test_tokens_after_an_update_have_the_log_probs_of_the_new_weights(make_tiny_model, tiny_tokenizer, prompts):
    model = make_tiny_model(seed=5)
    engine = LocalEngine(model, tiny_tokenizer)
    sampling = SamplingParams(3, 10, seed=1)
    begun = begun_by(engine, prompts, sampling, 5)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    new = make_tiny_model(seed=6)
    engine.load_weights(new.state_dict().items(), 2)
    got = engine.generate(prompts, sampling, begun)
    old_model = make_tiny_model(seed=5)
    old_model.load_state_dict(old)
    for prompt, group, before in zip(prompts, got, begun, strict=True):
        for completion, part in zip(group, before, strict=True):
            ids_R, split = completion.token_ids_R, part.num_tokens
            assert ids_R[:split].tolist() == part.token_ids_R.tolist()
            by_old, by_new = (
                full_logits(m, prompt, ids_R).log_softmax(-1).gather(1, ids_R[:, None])[:, 0] for m in (old_model, new)
            )
            assert torch.allclose(completion.logprobs_R[:split], by_old[:split], atol=2e-4)
            assert torch.allclose(completion.logprobs_R[split:], by_new[split:], atol=2e-4)
            if completion.num_tokens > split:
                assert float((by_old - by_new)[split:].abs().max()) > 1e-2  # the two can be told apart
