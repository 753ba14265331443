"""The ways to do one GRPO step that `python -m bench update` compares, and the plain update that they are held to.

    trl_images   TRL's GRPOTrainer as it is, the clip as pictures
    trl_video    the same, patched so that its loss sees the clip as a video
    original     VideoChat-R1's recipe: G rows with a copy of the video each, drawn by `generate` with top_k 50; head
                 and log-softmax on every token. Without its reference model (beta 0, as everyone here)
    ours         LocalEngine, Learner.update_grpo and the push of the weights, as a run has them

Shape letters: G completions, R tokens of one, L tokens of a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.step_timing import run_update, still_optimizer, take_gradients
from bench.step_ways import WayOptions, losses, original_loss
from bench.update_problem import NO_CLIPPING, Gradients, Layout, Problem, StepResult, group_of
from vcr1_fast.learner.model import load_hugging_face
from vcr1_fast.learner.optimizer import clip_grad_norm
from vcr1_fast.learner.sharding import SINGLE_PROCESS
from vcr1_fast.learner.step import Learner
from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.rollout.local_engine import LocalEngine
from vcr1_fast.run.weight_sync import WeightSync
from vcr1_fast.settings.config import Config, DataConfig, ModelConfig, OptimizerConfig, RolloutConfig
from vcr1_fast.types import RolloutGroup, SamplingParams

STILL = 1e-30  # a learning rate that changes no float32 weight; 0 is refused
CPU = torch.device("cpu")


class OursWay:
    """What `vcr1-fast train` does between two prompts, but for reading the clip."""

    def __init__(self, problem: Problem) -> None:
        point = problem.point
        config = Config(
            model=ModelConfig(path="tiny", gradient_checkpointing="none"),
            data=DataConfig(train=("none",)),
            rollout=RolloutConfig(group_size=point.num_completions, max_new_tokens=point.completion_len),
            optimizer=OptimizerConfig(learning_rate=STILL, max_grad_norm=NO_CLIPPING),
        )
        self.problem = problem
        self.learner = Learner(config, SINGLE_PROCESS, num_updates=1)
        engine_model = load_hugging_face("tiny", torch.float32, CPU)
        stop_ids = torch.tensor(SpecialIds.of(problem.tokenizer).stop)
        engine_model.lm_head.register_forward_hook(partial(never_stop, stop_ids))
        self.engine = LocalEngine(engine_model, problem.tokenizer)
        self.sync = WeightSync(self.learner.policy, self.engine)
        self.sync.push()

    def step(self, seed: int, *, wants_gradients: bool = False) -> StepResult:
        point, began_s = self.problem.point, time.perf_counter()
        prompt = self.problem.prompt()
        sampling = SamplingParams(point.num_completions, point.completion_len, seed=seed)
        [drawn] = self.engine.generate([prompt], sampling)
        group = group_of(prompt, [completion.token_ids_R.tolist() for completion in drawn])
        drawn_s = time.perf_counter()
        loss, gradients = self.update(group, wants_gradients=wants_gradients)
        updated_s = time.perf_counter()
        self.sync.push()
        total_ms = (time.perf_counter() - began_s) * 1e3
        ids = [completion.token_ids_R.tolist() for completion in group.completions]
        return StepResult(total_ms, (updated_s - drawn_s) * 1e3, prompt.token_ids_L.tolist(), ids, loss, gradients)

    def update(self, group: RolloutGroup, *, wants_gradients: bool = False) -> tuple[float, Gradients]:
        """Loss and gradients of one update on these answers."""
        taken: Gradients = {}

        def take(*_: Any) -> None:
            weights = self.learner.policy.hf.named_parameters()
            taken.update({name: w.grad.clone() for name, w in weights if w.grad is not None})

        hook = self.learner.optimizer.register_step_pre_hook(take) if wants_gradients else None
        [report] = self.learner.update_grpo([group])
        if hook is not None:
            hook.remove()
        return report.sums["loss"], taken

    def close(self) -> None:
        self.engine.close()


class OriginalWay:
    """See the module's docstring."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.hf: Any = load_hugging_face("tiny", torch.float32, CPU)
        self.optimizer = still_optimizer(self.hf)

    def step(self, seed: int, *, wants_gradients: bool = False) -> StepResult:
        point, began_s = self.problem.point, time.perf_counter()
        prompt = self.problem.prompt()
        torch.manual_seed(seed)
        ids_1L = prompt.token_ids_L[None]
        with torch.no_grad():
            out_GL = self.hf.generate(
                input_ids=ids_1L,
                attention_mask=torch.ones_like(ids_1L),
                mm_token_type_ids=2 * (ids_1L == self.hf.config.video_token_id).long(),
                pixel_values_videos=prompt.media[0].values_PC,
                video_grid_thw=torch.tensor([prompt.media[0].grid_thw]),
                second_per_grid_ts=torch.tensor([prompt.media[0].second_per_grid_s]),
                num_return_sequences=point.num_completions,
                max_new_tokens=point.completion_len,
                min_new_tokens=point.completion_len,
                do_sample=True,
                temperature=1.0,
                top_k=50,
                suppress_tokens=list(SpecialIds.of(self.problem.tokenizer).vision),
            )
        group = group_of(prompt, out_GL[:, ids_1L.shape[1] :].tolist())
        drawn_s = time.perf_counter()
        loss, gradients = self.update(group, wants_gradients=wants_gradients)
        ended_s = time.perf_counter()
        ids = [completion.token_ids_R.tolist() for completion in group.completions]
        return StepResult(
            (ended_s - began_s) * 1e3, (ended_s - drawn_s) * 1e3, prompt.token_ids_L.tolist(), ids, loss, gradients
        )

    def update(self, group: RolloutGroup, *, wants_gradients: bool = False) -> tuple[float, Gradients]:
        loss = original_loss(self.hf, group, range(len(group.completions)))
        loss.backward()
        clip_grad_norm(self.hf, NO_CLIPPING)
        weights = self.hf.named_parameters()
        taken = {name: w.grad.clone() for name, w in weights if w.grad is not None} if wants_gradients else {}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), taken

    def close(self) -> None: ...


@dataclass(frozen=True)
class WayKind:
    """A way by name. The first of a layout draws the answers on which all of them are compared."""

    name: str
    layout: Layout
    open: Callable[[Problem], Any]


def open_trl(problem: Problem) -> Any:
    from bench.update_trl import TrlWay  # TRL is a package of development

    return TrlWay(problem)


WAYS: tuple[WayKind, ...] = (
    WayKind("trl_images", "pictures", open_trl),
    WayKind("ours", "pictures", OursWay),
    WayKind("trl_video", "video", open_trl),
    WayKind("original", "video", OriginalWay),
    WayKind("ours", "video", OursWay),
)


def never_stop(stop_ids: Tensor, _head: Any, _args: Any, logits_BV: Tensor) -> Tensor:
    """Answers of one length, as `min_new_tokens` has it in the other ways."""
    return logits_BV.index_fill(-1, stop_ids, torch.finfo(logits_BV.dtype).min)


def plain_update(group: RolloutGroup, dtype: torch.dtype) -> tuple[float, Gradients]:
    """Loss and gradients of G separate rows in plain torch: the definition."""
    hf = load_hugging_face("tiny", dtype, CPU).train()
    options = WayOptions(len(group.completions), gradient_checkpointing=False)
    loss, _ = run_update(hf, None, losses("plain", hf, group, options))
    return loss, take_gradients(hf)
