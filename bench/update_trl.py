"""The real TRL `GRPOTrainer`, one step at a time, for `python -m bench update`.

`trl_images` is TRL as it is, the clip as pictures. `trl_video` is TRL with the clip as a video: its loss hands a model
pictures alone, so a video's pixels and positions are put into the call of the model here. Both generate with
transformers, score with TRL's own head and step with its default optimizer, at a learning rate of 0. Ids that stand for
pictures are not drawn: TRL does not suppress them, and a row that holds one more than its pictures ends its run.

Shape letters: G completions, L tokens of prompt and completion, C values of a patch.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import PrinterCallback, Qwen2_5_VLProcessor, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl.trainer import utils as trl_utils
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from bench.peers import TRL_VOCAB_CHUNK
from bench.update_problem import NO_CLIPPING, Gradients, Problem, StepResult, reward
from vcr1_fast.learner.model import load_hugging_face
from vcr1_fast.prompts.special_ids import SpecialIds


class ClipProcessor(Qwen2_5_VLProcessor):
    """The published processor, with pictures by its own PIL code. A video is cut into patches by ours, row by row as
    transformers does it: the processor of videos there needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.problem: Problem | None = None

    def apply_chat_template(self, conversation: Any, *args: Any, **options: Any) -> Any:
        problem = self.problem
        if problem is None or problem.layout == "pictures":
            return super().apply_chat_template(conversation, *args, **options)
        prompts = [problem.prompt() for _ in conversation]
        ids_GL = torch.stack([prompt.token_ids_L for prompt in prompts])
        types_GL = 2 * (ids_GL == self.video_token_id).long()
        return {"input_ids": ids_GL.tolist(), "mm_token_type_ids": types_GL.tolist(), **videos_of(prompts)}


def videos_of(prompts: list[Any]) -> dict[str, Tensor]:
    """What a model of transformers takes of some prompts' videos."""
    return {
        "pixel_values_videos": torch.cat([prompt.media[0].values_PC for prompt in prompts]),
        "video_grid_thw": torch.tensor([prompt.media[0].grid_thw for prompt in prompts]),
        "second_per_grid_ts": torch.tensor([prompt.media[0].second_per_grid_s for prompt in prompts]),
    }


def load_processor(tokenizer: Any, problem: Problem | None = None) -> ClipProcessor:
    tokenizer.padding_side = "left"
    processor = ClipProcessor(Qwen2VLImageProcessorPil(), tokenizer, tokenizer.chat_template)
    processor.problem = problem
    return processor


def dataset_of(problem: Problem) -> Dataset:
    if problem.layout == "video":
        content = [{"type": "video", "text": ""}, {"type": "text", "text": problem.question}]
        return Dataset.from_list([{"prompt": [{"role": "user", "content": content}]}] * 2)
    pictures = [Image.fromarray(picture) for picture in problem.pictures]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": problem.question}], "images": pictures}] * 2)


class SteppedTrainer(GRPOTrainer):
    """Notes when answers and rewards were there, and what they were."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        inputs = super()._prepare_inputs(generation_batch)
        self.drawn, self.drawn_s = inputs, time.perf_counter()
        return inputs

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        self.loss_value = loss.detach()
        return loss


class StepClock(TrainerCallback):
    """When the step began and ended, and the gradients before the optimizer takes them."""

    def __init__(self) -> None:
        self.began_s = self.ended_s = 0.0
        self.gradients: Gradients | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began_s = time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, **known: Any) -> None:
        if self.gradients is not None:
            weights = known["model"].named_parameters()
            self.gradients = {name: w.grad.clone() for name, w in weights if w.grad is not None}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended_s = time.perf_counter()


class TrlWay:
    """One way of `update_ways`: a step is `trainer.train()` with one step, timed from its own begin to its own end."""

    def __init__(self, problem: Problem) -> None:
        point = problem.point
        self.problem, self._clock = problem, StepClock()
        self._folder = tempfile.TemporaryDirectory()
        self.model = load_hugging_face("tiny", torch.float32, torch.device("cpu"))
        arguments = GRPOConfig(
            output_dir=self._folder.name,
            per_device_train_batch_size=point.num_completions,
            num_generations=point.num_completions,
            max_completion_length=point.completion_len,
            generation_kwargs={
                "min_new_tokens": point.completion_len,
                "suppress_tokens": list(SpecialIds.of(problem.tokenizer).vision),
            },
            max_steps=1,
            learning_rate=0.0,
            max_grad_norm=NO_CLIPPING,
            loss_type="grpo",
            logging_steps=1000,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        # entries of the vocabulary that TRL's head scores at a time: it holds as many, also where a model has fewer
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(TRL_VOCAB_CHUNK, self.model.lm_head.out_features)
        given: Any = {"processing_class": load_processor(problem.tokenizer, problem), "callbacks": [self._clock]}
        with quiet():
            self.trainer = SteppedTrainer(self.model, trl_reward, arguments, dataset_of(problem), **given)
        self.trainer.remove_callback(PrinterCallback)
        self.patch = None
        if problem.layout == "video":
            self.patch = self.model.register_forward_pre_hook(video_hook(problem), with_kwargs=True)

    def step(self, seed: int, *, wants_gradients: bool = False) -> StepResult:
        self._clock.gradients = {} if wants_gradients else None
        self.trainer.args.seed = seed
        with quiet():
            self.trainer.train()
        drawn, clock = self.trainer.drawn, self._clock
        return StepResult(
            total_ms=(clock.ended_s - clock.began_s) * 1e3,
            update_ms=(clock.ended_s - self.trainer.drawn_s) * 1e3,
            prompt_ids=self.problem.as_video(drawn["prompt_ids"][0]).tolist(),
            completion_ids=drawn["completion_ids"].tolist(),
            loss=float(self.trainer.loss_value),
            gradients=clock.gradients or {},
        )

    def close(self) -> None:
        self._folder.cleanup()


def video_hook(problem: Problem) -> Callable[..., Any]:
    """Puts the video into the calls by which TRL scores tokens; those that generate have it from TRL."""
    prompt = problem.prompt()

    def add_video(_model: Any, args: Any, options: dict[str, Any]) -> Any:
        if not options.get("fused_lm_head"):
            return None
        num_rows, length = options["input_ids"].shape
        added = torch.arange(length - len(prompt.token_ids_L)) + prompt.next_position
        positions_3L = torch.cat([prompt.position_ids_3L, added.expand(3, -1)], dim=1)
        video = {"position_ids": positions_3L[:, None].expand(-1, num_rows, -1), **videos_of([prompt] * num_rows)}
        return args, options | video

    return add_video


def trl_reward(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    return [reward(ids) for ids in completion_ids]


@contextmanager
def quiet() -> Iterator[None]:
    """A trainer prints its metrics, and a warning that there is no GPU."""
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("transformers").setLevel(level)
