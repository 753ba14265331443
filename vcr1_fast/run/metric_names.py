"""Every name that metrics.jsonl and TensorBoard get, with what it is: `vcr1-fast watch` shows it, docs/metrics.md too.

Names are TRL's where TRL has one. Values are of one step and over all ranks unless the line says otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Metric:
    """One name, or several with a {placeholder} in it."""

    name: str
    meaning: str
    is_main: bool = False  # stands in `watch` without --all

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What the name matches; a placeholder is one part between slashes, {metric} and {part} any number of them."""
        wild = {"metric": ".+", "part": ".+", "reason": ".+"}
        pieces = re.split(r"\{(\w+)\}", self.name)
        texts = [re.escape(piece) if i % 2 == 0 else wild.get(piece, "[^/]+") for i, piece in enumerate(pieces)]
        return re.compile("".join(texts))


METRICS = (
    Metric("reward", "mean reward of all drawn answers, the weighted sum of the parts", True),
    Metric("rewards/{task}/{part}/mean", "mean of one reward part of one task, over answers, before shaping", True),
    Metric("rewards/{task}/{part}/std", "its standard deviation over answers"),
    Metric("reward_std", "standard deviation of the rewards in a group, mean over groups; 0: nothing to learn", True),
    Metric("frac_reward_zero_std", "share of groups whose answers all earn the same (zero variance)", True),
    Metric("completions/count", "answers that the engine drew for this step"),
    Metric("completions/mean_length", "their mean number of tokens", True),
    Metric("completions/min_length", "tokens of the shortest"),
    Metric("completions/max_length", "tokens of the longest"),
    Metric("completions/mean_terminated_length", "mean tokens of those that ended by themselves"),
    Metric("completions/clipped_ratio", "share cut off at rollout.max_new_tokens", True),
    Metric("loss", "the loss whose gradient is taken; near 0 on policy, whatever is learned", True),
    Metric("nll", "supervised training: negative log-likelihood a token, nats", True),
    Metric("grad_norm", "norm of the gradient before clipping, mean over the step's updates", True),
    Metric("learning_rate", "of the step's last update"),
    Metric("entropy", "mean entropy of the policy's next-token distribution, nats", True),
    Metric("kl", "mean KL to the reference model a token (k3 estimate), nats; with algorithm.beta > 0", True),
    Metric("clip_ratio/low_mean", "share of tokens whose ratio is clipped from below"),
    Metric("clip_ratio/high_mean", "share of tokens whose ratio is clipped from above"),
    Metric("clip_ratio/region_mean", "both together", True),
    Metric("skipped_updates", "updates left out because the gradient was not finite"),
    Metric("groups_too_large", "groups left out because they fit no micro-batch"),
    Metric("sampling/sampling_logp_difference/mean", "mean difference of engine's and learner's log-probs, nats", True),
    Metric("sampling/sampling_logp_difference/max", "the largest of them"),
    Metric("sampling/importance_sampling_ratio/mean", "mean weight that algorithm.sampling_correction gives a token"),
    Metric("sampling/importance_sampling_ratio/cut_frac", "share of tokens whose weight was cut"),
    Metric("sampling/policy_lag/mean", "updates between drawing and training on a group, mean over groups"),
    Metric("sampling/policy_lag/max", "the most of them"),
    Metric("sampling/resampled_groups", "groups without a signal for which further prompts were drawn"),
    Metric("sampling/ground_truths", "true answers that were mixed into groups"),
    Metric("advantage_scale/{task}", "what algorithm.scale_advantages=task divides a task's advantages by"),
    Metric("epoch", "passes through data.train since the start", True),
    Metric("epoch/{task}", "passes through the examples of a task"),
    Metric("bad_samples", "examples found unusable since the start", True),
    Metric("bad_samples/{reason}", "those of one kind of reason"),
    Metric("durations_off", "examples whose annotated length is not the file's, since the start"),
    Metric("reward_failures", "groups whose reward could not be computed; they come again"),
    Metric("num_tokens", "tokens of packed rows since the start"),
    Metric("step_tokens/executed", "tokens of the packed rows, each prompt once"),
    Metric("step_tokens/unshared", "tokens that separate rows would have had, the prompt once an answer"),
    Metric("tokens_per_s/executed", "the first a second of step_time, all ranks", True),
    Metric("tokens_per_s/unshared", "the second, for comparison with trainers that do not share", True),
    Metric("train/tokens_per_second_per_gpu", "tokens of the packed rows a second of the updates, on each GPU"),
    Metric("train/mfu", "share of the GPU's peak in the updates: model FLOP, none recomputed; known GPUs only", True),
    Metric("busy_frac", "planned work of all ranks over the time of the slowest: 1 is perfect balance", True),
    Metric("step_time", "seconds of the step, without held-out scores and checkpoints", True),
    Metric("time/prompts_s", "reading videos and building prompts", True),
    Metric("time/rollout_s", "waiting for the answers", True),
    Metric("time/draw_s", "drawing them, beside the learner's work with rollout.max_policy_lag > 0", True),
    Metric("time/update_s", "forward, backward and optimizer", True),
    Metric("time/weight_sync_s", "bringing the new weights to the engine", True),
    Metric("time/eval_s", "held-out scores since the last step", True),
    Metric("time/checkpoint_s", "what checkpoints held the run up since the last step, the copy to host memory", True),
    Metric("checkpoint/write_s", "writing the one that became whole in this step, beside the steps"),
    Metric("time/video_wait_s", "seconds that threads of rank 0 waited for clips", True),
    Metric("video/clips_read", "clips that were read, rank 0, since the start, as all of video/ and cache/"),
    Metric("video/clips_refused", "those that could not be"),
    Metric("video/cache_hits", "clips that the cache had when they were asked for"),
    Metric("video/decode_s", "the readers' seconds, added up"),
    Metric("video/wait_s", "seconds in which a clip was waited for, added up over threads"),
    Metric("video/waiting_bytes", "bytes of clips that are read and not yet fetched"),
    Metric("video/timeouts", "readers that took longer than video.timeout_s"),
    Metric("video/crashes", "readers that crashed"),
    Metric("video/workers_replaced", "reader processes that were started anew"),
    Metric("cache/hit_rate", "share of clips that the cache had"),
    Metric("cache/misses", "clips that it had not"),
    Metric("cache/ram_hit_rate", "share that was in memory"),
    Metric("cache/ram_bytes", "bytes in memory"),
    Metric("cache/ram_entries", "clips in memory"),
    Metric("cache/ram_evicted", "clips dropped from memory"),
    Metric("cache/disk_hit_rate", "share that was on disk, of those not in memory"),
    Metric("cache/disk_bytes", "bytes on disk"),
    Metric("cache/disk_evicted", "clips dropped from disk"),
    Metric("cache/disk_is_off", "1 once the disk could not be written"),
    Metric("cache/healed", "damaged files that were made anew"),
    Metric("engine/restarts", "SGLang workers that were started again, all ranks, since the start"),
    Metric("eval/{task}/{metric}", "held-out score, on a line of its own after the step", True),
)


def metric_of(name: str) -> Metric | None:
    """What a logged name is; None for one that is not listed."""
    return next((metric for metric in METRICS if metric.pattern.fullmatch(name)), None)
