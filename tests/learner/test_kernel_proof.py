"""Kernels are used when they agree with their plain paths; each one that does not is left out alone, and named."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from vcr1_kernels import reference

from tests.learner import kernel_stand_ins
from tests.learner.kernel_stand_ins import SMALL, SUBJECT, put_stand_ins
from tests.learner.test_step import make_config, update_and_capture
from tests.ranks import on_ranks
from vcr1_fast.learner import kernel_problems, kernel_proof
from vcr1_fast.learner.kernel_choice import KernelChoice, Pick, cpu_choice, plain_choice
from vcr1_fast.learner.kernel_memory import cache_folder
from vcr1_fast.learner.kernel_proof import Proof, Subject, choose_kernels, distance, prove
from vcr1_fast.learner.model import PolicyModel, load_hugging_face
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World
from vcr1_fast.learner.step import Learner
from vcr1_fast.learner.tower_attention import NAMES
from vcr1_fast.run.random_state import rng_state
from vcr1_fast.run.sources import open_source
from vcr1_fast.settings.config import AlgorithmConfig, Config, ConfigError, ModelConfig, VideoConfig
from vcr1_fast.types import Frames
from vcr1_fast.video import patches as patches_module
from vcr1_fast.video.patches import PatchSource

PROVEN = {"logprob": "triton", "policy_loss": "triton", "attention": "flash", "tower": "flash", "patchify": "triton"}
PROVEN |= {"norm": "liger", "mlp": "liger", "rotary": "triton"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vcr1-fast" / "kernels"


def ways(choice: KernelChoice) -> dict[str, str]:
    return {name: pick.way for name, pick in choice.picks()}


def raises(*_arguments: Any, **_options: Any) -> Any:
    raise RuntimeError("no such instruction\nand a page of context")


# Each breaks little: one token, one gradient, one window, one pixel row of one frame.


def one_token_is_off(*inputs: Any, **options: Any):
    logprob_N, entropy_N = kernel_stand_ins.linear_logprob(*inputs)
    factor_N = torch.ones_like(logprob_N)
    factor_N[5] = 1.05
    return logprob_N * factor_N, entropy_N


def one_row_has_no_gradient(hidden, *inputs: Any, **options: Any):
    parts = torch.cat([hidden[:3], hidden[3:4].detach(), hidden[4:]])
    return kernel_stand_ins.linear_policy_loss(parts, *inputs)


def half_the_gradient_of_keys(query, key, *inputs: Any):
    return kernel_stand_ins.prefix_attention(query, 0.5 * key + 0.5 * key.detach(), *inputs)


def one_window_too_large(query, key, value, ends, *inputs: Any):
    ends = ends.clone()
    ends[1] += 1
    return kernel_stand_ins.varlen_attention(query, key, value, ends, *inputs)


def the_last_frame_is_not_repeated(rgb_FHW3, dtype, *, backend, **cut: Any):
    return reference.patchify(torch.cat([rgb_FHW3, torch.zeros_like(rgb_FHW3[:1])]), dtype, **cut)


def not_a_number(rgb_FHW3, dtype, *, backend, **cut: Any):
    patches = reference.patchify(rgb_FHW3, dtype, **cut)
    patches[7, 3] = math.nan
    return patches


def the_scale_is_left_out(module, hidden):
    return kernel_stand_ins.norm_forward(SimpleNamespace(weight=module.weight * 0 + 1, variance_epsilon=0.0), hidden)


def half_the_gradient_of_the_gate(module, pair):
    return kernel_stand_ins.mlp_forward(module, (0.5 * pair[0] + 0.5 * pair[0].detach(), pair[1]))


def one_token_turns_back(query, key, cos, sin):
    sin = sin.clone()
    sin[5] *= -1
    return kernel_stand_ins.tower_rotary(query, key, cos, sin)


WRONG = [
    ("logprob", "fused_linear_logprob", one_token_is_off, "logprob"),
    ("policy_loss", "fused_linear_policy_loss", one_row_has_no_gradient, "grad hidden"),
    ("attention", "prefix_attention", half_the_gradient_of_keys, "grad key"),
    ("tower", "varlen_attention", one_window_too_large, "out"),
    ("patchify", "patchify", the_last_frame_is_not_repeated, "patches"),
    ("patchify", "patchify", not_a_number, "patches nan"),
    ("norm", "norm_forward", the_scale_is_left_out, "decoder 0"),
    ("mlp", "mlp_forward", half_the_gradient_of_the_gate, "decoder gradient 0"),
    ("rotary", "tower_rotary", one_token_turns_back, "tower 0"),
    ("patchify", "patchify", lambda rgb_FHW3, dtype, **_: torch.zeros(4, 1176), "gave the shape (4, 1176)"),
    ("logprob", "fused_linear_logprob", raises, "raised RuntimeError: no such instruction"),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "name", "stand_in", "words"), WRONG)
def test_a_wrong_kernel_is_left_out_alone_and_named(monkeypatch, kernel, name, stand_in, words):
    put_stand_ins(monkeypatch, **{name: stand_in})
    proof = prove(SUBJECT)
    picks = dict(proof.choice.picks())
    plain = plain_choice()
    expected = PROVEN | {kernel: getattr(plain, kernel).way}
    assert ways(proof.choice) == expected
    assert [name for name, pick in picks.items() if pick.is_fallback] == [kernel]
    assert words in picks[kernel].reason and "\n" not in picks[kernel].reason
    said = proof.choice.describe()
    assert said.count("AS A FALLBACK") == 1 and picks[kernel].reason in said
    assert any(f"kernel {kernel} (" in line and "failed" in line for line in proof.lines())


def test_right_kernels_are_all_taken_and_the_numbers_printed(monkeypatch):
    put_stand_ins(monkeypatch)
    proof = prove(SUBJECT)
    assert ways(proof.choice) == PROVEN
    assert [v.outcome for v in proof.verdicts] == ["held"] * 8
    for verdict, line in zip(proof.verdicts, proof.lines(), strict=True):
        assert 0 < verdict.distance <= verdict.allowed and verdict.plain_distance < verdict.allowed
        assert f"{verdict.distance:.1e} from float64, allowed {verdict.allowed:.1e}" in line
        assert f"plain path {verdict.plain_distance:.1e}" in line
    assert proof.choice.describe().startswith("head: fused, Triton rows; attention: packed rows, flash (")
    assert "kernels compared with their plain paths in 0." in proof.choice.describe()


def test_the_next_kernel_is_tried_before_the_plain_path(monkeypatch):
    """Where flash attention or the row kernels fail, dense scores and whole logits of a long row might not fit."""

    def broken(function, way):
        def call(*inputs, **options):
            return raises() if (options.get("backend") or inputs[-1]) == way else function(*inputs, **options)

        return call

    attention = broken(kernel_stand_ins.prefix_attention, "flash")
    head = broken(kernel_stand_ins.linear_logprob, "triton")
    put_stand_ins(monkeypatch, prefix_attention=attention, fused_linear_logprob=head)
    choice = prove(SUBJECT, kernels=("logprob", "attention")).choice
    assert (choice.logprob.way, choice.attention.way) == ("torch", "triton")
    assert choice.attention.is_fallback and choice.attention.reason.startswith("flash raised RuntimeError")


@pytest.mark.parametrize(("share", "outcome"), [(0.98, "held"), (1.02, "failed")])
def test_the_bound_is_four_times_the_plain_paths_distance_and_a_floor(monkeypatch, share, outcome):
    """Patches scaled by 1 + d are off by d in every row. eps: 2^-7 of bfloat16, 2^-23 of float32."""
    rgb_FHW3 = torch.randint(0, 256, (5, 84, 140, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact = reference.patchify(rgb_FHW3, torch.float64)
    error = reference.patchify(rgb_FHW3, torch.bfloat16).double() - exact
    plain = float((error.norm(dim=1) / exact.norm(dim=1)).max())  # all rows are of about the same norm
    allowed = 4 * plain + 64 * 2**-23 + 2**-8

    put_stand_ins(monkeypatch, patchify=lambda rgb, dtype, **_options: exact * (1 + share * allowed))
    [verdict] = prove(SUBJECT, kernels=("patchify",)).verdicts
    assert verdict.outcome == outcome
    assert verdict.allowed == pytest.approx(allowed, rel=0.02)
    assert verdict.distance == pytest.approx(share * allowed, rel=0.02)


def test_a_plain_path_that_is_far_off_itself_proves_nothing(monkeypatch):
    """A kernel and a plain path that both halve the values in the run's type."""
    real = reference.patchify

    def halved(rgb_FHW3, dtype, **cut: Any):
        return real(rgb_FHW3, dtype, **cut) * (1 if dtype == torch.float64 else 0.5)

    monkeypatch.setattr(reference, "patchify", halved)
    put_stand_ins(monkeypatch)
    [verdict] = prove(SUBJECT, kernels=("patchify",)).verdicts
    assert (verdict.outcome, verdict.allowed) == ("failed", 0.1)
    assert verdict.distance == verdict.plain_distance == pytest.approx(0.5, abs=0.01)


def test_distances_by_hand():
    exact = torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 0.1]])  # norms 5, 10, 0.1; the median is 5
    assert distance(exact, exact) == 0.0
    assert distance(exact + torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), exact) == pytest.approx(0.1)
    assert distance(exact + torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.0]]), exact) == pytest.approx(0.1)
    assert distance(torch.tensor([1.0, -2.0, 3.3]), torch.tensor([1.0, -2.0, 3.0])) == pytest.approx(0.1)
    assert distance(torch.tensor(0.9), torch.tensor(1.0)) == pytest.approx(0.1)
    assert distance(torch.zeros(3), torch.zeros(3)) == 0.0
    assert distance(torch.tensor([0.0, 0.0, 1.0]), torch.zeros(3)) == math.inf
    assert math.isnan(distance(torch.tensor([1.0, math.nan]), torch.ones(2)))
    with pytest.raises(ValueError, match=r"gave the shape \(3,\), wanted \(2,\)"):
        distance(torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize("trains_head", [True, False])
def test_the_real_kernels_hold(monkeypatch, trains_head):
    """In Triton's interpreter, with every term of the loss; on a machine with a GPU the other test runs them."""
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted where there is a GPU")
    shapes = replace(SMALL, dtype=torch.float32, trains_head=trains_head)
    kernels = ("logprob", "policy_loss", "attention", "patchify") if trains_head else ("logprob", "policy_loss")
    calls = []
    real = kernel_problems.fused_linear_logprob
    monkeypatch.setattr(
        kernel_problems, "fused_linear_logprob", lambda *a, **k: (calls.append(k["backend"]), real(*a, **k))[1]
    )
    proof = prove(Subject(shapes, AlgorithmConfig(beta=0.1, entropy_coef=0.01)), kernels=kernels)
    assert [(v.kernel, v.way, v.outcome) for v in proof.verdicts] == [(k, "triton", "held") for k in kernels]
    assert calls == ["triton"]
    for verdict in proof.verdicts:
        assert verdict.distance < 5e-6, verdict  # measured 1e-7 to 2e-6


def test_what_held_is_remembered_for_these_shapes(monkeypatch, cache):
    put_stand_ins(monkeypatch)
    first = prove(SUBJECT)
    [file] = cache.iterdir()
    content = json.loads(file.read_text())
    assert content["key"]["torch"] == torch.__version__ and "hidden_size=32" in content["key"]["shapes"]
    put_stand_ins(monkeypatch, patchify=raises)
    again = prove(SUBJECT)
    assert again.verdicts == first.verdicts and "on an earlier start" in again.choice.proof
    assert ways(again.choice) == PROVEN
    assert ways(prove(SUBJECT, fresh=True).choice) == PROVEN | {"patchify": "torch"}
    other = Subject(replace(SMALL, hidden_size=48), SUBJECT.algorithm)
    assert prove(other, kernels=("patchify",)).choice.patchify.is_fallback
    other = Subject(SMALL, AlgorithmConfig(loss="gspo"))
    assert prove(other, kernels=("patchify",)).choice.patchify.is_fallback


def test_what_failed_is_tried_again(monkeypatch):
    put_stand_ins(monkeypatch, patchify=raises)
    assert prove(SUBJECT, kernels=("patchify",)).choice.patchify.is_fallback
    put_stand_ins(monkeypatch)
    assert prove(SUBJECT, kernels=("patchify",)).choice.patchify == Pick("triton")


@pytest.mark.parametrize("content", ["", "[]", '{"key": 1}', "{", '{"verdicts": [{"kernel": 3}]}', b"\xff\xfe"])
def test_a_broken_cache_costs_nothing_but_time(monkeypatch, cache, content):
    put_stand_ins(monkeypatch)
    prove(SUBJECT, kernels=("patchify",))
    [file] = cache.iterdir()
    whole = file.read_text()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    proof = prove(SUBJECT, kernels=("patchify",))
    assert proof.choice.patchify == Pick("triton") and "earlier" not in proof.choice.proof
    assert json.loads(file.read_text())["key"] == json.loads(whole)["key"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    put_stand_ins(monkeypatch)
    assert prove(SUBJECT, kernels=("patchify",)).choice.patchify == Pick("triton")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/folder")  # to be ignored, says the XDG specification
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vcr1-fast" / "kernels"


def test_a_kernel_that_takes_the_gpu_with_it_is_left_out_by_the_next_start(monkeypatch):
    put_stand_ins(monkeypatch, patchify=raises)
    monkeypatch.setattr(kernel_proof._Examination, "_answers", lambda self: False)
    with pytest.raises(ConfigError, match=r"kernel patchify took the GPU's context .* start the run again"):
        prove(SUBJECT)
    put_stand_ins(monkeypatch)
    for fresh in (False, True):
        proof = prove(SUBJECT, fresh=fresh)
        assert ways(proof.choice) == PROVEN | {"patchify": "torch"}
        assert "on an earlier start: raised RuntimeError" in proof.choice.patchify.reason


def test_every_rank_stops_when_one_has_lost_its_gpu(monkeypatch):
    put_stand_ins(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(kernel_proof, "all_max_int", lambda value, world: max(value, 2))
        with pytest.raises(ConfigError, match=r"kernel logprob took the GPU's context .* crashed on another rank"):
            prove(SUBJECT)
    assert ways(prove(SUBJECT).choice) == PROVEN  # this rank's own verdict is what it remembers


def choose_on_two(world: World, folder: str) -> None:
    """Patchify breaks on rank 1 alone, where log-probs are remembered; each rank writes what it chose."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", f"{folder}/cache-{world.rank}")
    put_stand_ins(patch)
    if world.rank == 1:
        prove(SUBJECT, kernels=("logprob",))
        put_stand_ins(patch, patchify=raises)
    proof = prove(SUBJECT, world, kernels=("logprob", "patchify"))
    Path(folder, f"{world.rank}.json").write_text(json.dumps(asdict(proof.choice)))


def test_ranks_choose_alike(tmp_path):
    on_ranks(choose_on_two, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for choice in (first, second):
        assert (choice["logprob"]["way"], choice["patchify"]["way"]) == ("triton", "torch")
    assert first["patchify"]["reason"] == "triton failed on another rank, whose own message says why"
    assert second["patchify"]["reason"] == "triton raised RuntimeError: no such instruction"


def drawing(function):
    """A kernel that takes numbers from the global generator."""

    def call(*inputs, **options):
        torch.randn(3)
        np.random.random()
        return function(*inputs, **options)

    return call


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_random_state_and_the_first_step_are_what_they_are_without(
    monkeypatch, make_model, make_group, tmp_path, device
):
    """On a GPU the kernels themselves, at the sizes of the 7B model: all hold, in ten seconds."""
    make_model().save_pretrained(tmp_path / "model")
    config, world = make_config(tmp_path / "model"), World(device=torch.device(device))
    subject, choice = SUBJECT, cpu_choice(torch.float32)
    if device == "cuda":
        config = replace(config, model=replace(config.model, compute_dtype="bfloat16", device="cuda"))
        subject, choice = Subject.of_public_model("Qwen2.5-VL-7B", world.device), KernelChoice()
    else:
        put_stand_ins(monkeypatch, **{name: drawing(f) for name, f in kernel_stand_ins.STAND_INS.items()})
    losses = []
    for is_proven in (False, True):
        torch.manual_seed(3)
        if is_proven:
            before = rng_state()
            proof = prove(subject, world)
            after = rng_state()
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert all(v.outcome == "held" for v in proof.verdicts), proof.lines()
            assert [pick.is_fallback for _, pick in proof.choice.picks()] == [False] * 8, proof.lines()
            assert proof.check_s <= 10.0
        learner = Learner(config, world, 10, choice)
        [report], _ = update_and_capture(learner, [make_group(0, (5, 3, 8))])
        losses.append((report.sums["loss"], float(torch.rand(()))))
    assert losses[0] == losses[1]


def test_what_model_kernels_means(monkeypatch):
    config, cuda = Config(), World(device=torch.device("cuda"))
    off = replace(config, model=replace(config.model, kernels="off"))
    required = replace(config, model=replace(config.model, kernels="required"))
    for world in (SINGLE_PROCESS, cuda):  # off compares nothing, and needs no Triton
        assert ways(choose_kernels(off, world).choice) == ways(plain_choice())
    assert choose_kernels(off, cuda).choice.describe() == (
        "head: plain torch, whole logits; attention: packed rows, dense scores in torch; tower: dense calls; "
        "patchify: torch; norm: transformers; mlp: transformers; rotary: transformers; model.kernels is off"
    )
    for each in (config, required):
        said = choose_kernels(each, SINGLE_PROCESS).choice.describe()
        assert said == (
            "head: fused, rows in torch; attention: packed rows, flash (torch's flash attention for CPUs); "
            "tower: dense calls; patchify: torch; norm: transformers; mlp: transformers; rotary: transformers"
        )
    subjects = []
    reason = "triton raised RuntimeError: triton is not installed"
    found = Proof(KernelChoice(patchify=Pick("torch", reason, is_fallback=True)))
    monkeypatch.setattr(kernel_proof, "prove", lambda subject, world: (subjects.append(subject), found)[1])
    assert choose_kernels(config, cuda) is found
    with pytest.raises(
        ConfigError, match=r"model\.kernels is required, but .*patchify: triton raised .*set it to auto"
    ):
        choose_kernels(required, cuda)
    # the tiny model: width 128, 4 heads over 2 of keys, head dimension 32, tower of width 64 with 4 heads
    text = load_hugging_face("tiny", torch.float32, torch.device("cpu")).config
    shapes = subjects[0].shapes
    assert shapes.dtype == torch.bfloat16 and shapes.temperature == config.rollout.temperature
    assert (shapes.hidden_size, shapes.vocab_size) == (text.text_config.hidden_size, text.text_config.vocab_size)
    assert shapes.num_key_heads == text.text_config.num_key_value_heads
    assert shapes.head_dim * shapes.num_heads == shapes.hidden_size
    assert shapes.tower_head_dim * shapes.tower_heads == text.vision_config.hidden_size


def test_the_vocabulary_is_cut_to_a_block_and_its_own_ragged_end():
    assert replace(SMALL, vocab_size=152064).vocab_chunk == 8192 + 4608 and 152064 == 18 * 8192 + 4608
    assert replace(SMALL, vocab_size=9000).vocab_chunk == 9000
    assert SMALL.vocab_chunk == 96


def test_policy_loss_of_the_definition_moves_its_vectors():
    """On CUDA a learner's vectors lie on the host; here the meta device is the other one."""
    head = (torch.zeros(4, 8, device="meta"), torch.zeros(9, 8, device="meta"), torch.zeros(4, device="meta").long())
    tokens = kernel_problems.TokenVectors(torch.ones(4), torch.ones(4))
    loss, _ = plain_choice().linear_policy_loss(*head, kernel_proof.policy_loss(AlgorithmConfig()), tokens, 1.0)
    assert loss.device.type == "meta" and loss.shape == ()


@pytest.mark.parametrize(
    ("way", "dtype", "name"),
    [
        ("flash", torch.bfloat16, NAMES["flash"]), ("plain", torch.bfloat16, NAMES["plain"]),
        ("auto", torch.bfloat16, NAMES["flash"]), ("auto", torch.float32, NAMES["plain"]),
    ],
)  # fmt: skip
def test_a_tower_on_cuda_goes_the_way_of_the_choice(way, dtype, name):
    tower = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"), modules=lambda: ())
    KernelChoice(tower=Pick(way)).switch_tower(tower, torch.device("cpu"), dtype)
    assert tower.config._attn_implementation == NAMES["plain"]
    KernelChoice(tower=Pick(way)).switch_tower(tower, torch.device("cuda"), dtype)
    assert tower.config._attn_implementation == name


def test_policy_frozen_tower_and_frames_take_theirs_from_the_choice(monkeypatch):
    switched = []
    monkeypatch.setattr(KernelChoice, "switch_tower", lambda choice, tower, *rest: switched.append((choice, *rest)))
    seen = []

    def stand_in(rgb_FHW3, dtype, *, backend, **cut: Any):
        seen.append(backend)
        return reference.patchify(rgb_FHW3, dtype, **cut)

    monkeypatch.setattr(patches_module, "patchify", stand_in)
    frames = Frames(torch.zeros(2, 28, 28, 3, dtype=torch.uint8), torch.zeros(2), 2.0, 1.0, reader="none")
    config = Config(model=ModelConfig(freeze_vision=True), video=VideoConfig(num_workers=0))
    choice, on_cpu = KernelChoice(tower=Pick("plain")), torch.device("cpu")
    PolicyModel(load_hugging_face("tiny", torch.float32, on_cpu), ModelConfig(), torch.float32, choice)
    source = open_source(config, on_cpu, choice)
    source.close()
    assert switched == [(choice, on_cpu, torch.float32)] * 2
    loader = cast(Any, SimpleNamespace(get=lambda request: frames))
    for choice in (None, KernelChoice(patchify=Pick("torch"))):
        PatchSource(loader, source.cache, config.video, source.device, source.dtype, None, choice)("v.mp4")
    assert seen == ["auto", "torch"]
