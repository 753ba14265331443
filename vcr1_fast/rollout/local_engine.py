"""Rollouts by the Hugging Face model in this process: the default on any machine, and the plain path of other engines.

Each prompt goes through the vision tower once and through the decoder once; its keys and values are kept once for its
G completions. All completions of a chunk are then decoded together, one token a step.

Shape letters: P prompts, G completions of one prompt, B rows still decoded, L prompt tokens, M video tokens (those
of images too), D hidden, V vocabulary, S steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from vcr1_fast.learner.attention import use_causal_attention
from vcr1_fast.learner.families import family_of
from vcr1_fast.learner.kernel_choice import KernelChoice
from vcr1_fast.prompts.special_ids import SpecialIds
from vcr1_fast.rollout.batches import in_batches
from vcr1_fast.rollout.decode_step import CapturedStep, DecodeStep
from vcr1_fast.rollout.engine import NOT_BEGUN, Begun, Quota, is_done
from vcr1_fast.rollout.grouped_cache import GroupedCache
from vcr1_fast.rollout.sampling import check_sampling, sample_tokens, seen_in_prompts, uniforms
from vcr1_fast.rollout.weight_table import WeightTable
from vcr1_fast.types import Completion, FinishReason, Prompt, RunError, SamplingParams
from vcr1_fast.video.embed import embed_videos


class LocalEngine:
    """A RolloutEngine around a model that nobody else uses: it is switched to eval mode, and projections of one input
    are laid behind one another, see `decode_step`.

    Tokens depend on weights, prompt, its index in the call, and the seed; not on the batches, but for rounding.
    Ids that stand for pictures are never drawn. Log-probs are over all others, see `sampling.sample_tokens`.

    Example: `LocalEngine(model, tokenizer).generate(prompts, SamplingParams(8, 256))[0][0].text`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch_rows: int = 256,
        max_batch_tokens: int = 65536,
        cuda_graph: bool = False,
    ) -> None:
        """`max_batch_rows`, `max_batch_tokens`: bounds of what is decoded together, see `batches.in_batches`; a group
        is never split. `cuda_graph`: on CUDA, see `decode_step.CapturedStep`.

        Raises ValueError when the tokenizer does not fit the model, or the model has layers that `DecodeStep` refuses.
        """
        special = SpecialIds.of(tokenizer)
        self._family = family_of(model.config)
        for kind in ("video", "image"):
            pad_id, token_id = getattr(special, f"{kind}_pad"), getattr(model.config, f"{kind}_token_id")
            if pad_id != token_id:
                raise ValueError(
                    f"the tokenizer's <|{kind}_pad|> is {pad_id}, but the model's {kind}_token_id is {token_id}: load "
                    "both from one checkpoint"
                )
        decoder = self._family.decoder(model)
        if set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention"}:
            raise ValueError("the model has sliding-window layers: set text_config.use_sliding_window to false")
        self.policy_version = 0
        self.tokenizer = tokenizer
        self.max_batch_rows, self.max_batch_tokens = max_batch_rows, max_batch_tokens
        self.on_token: Callable[[Tensor], None] | None = None  # called with each step's ids [B] of the rows not ended
        self.model: Any = model.eval().requires_grad_(False)
        use_causal_attention(decoder)
        KernelChoice().switch_tower(self._family.tower(model), model.device, model.dtype)
        self._step: Any = DecodeStep(decoder, model.lm_head)
        self._is_captured = cuda_graph and model.device.type == "cuda"
        self._stop_ids = special.stop
        self._suppressed_ids = torch.tensor(special.vision, device=model.device)
        self._table = WeightTable(model.state_dict())
        self._is_interrupted = threading.Event()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        begun: Begun | None = None,
        quota: Quota | None = None,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Tokens of `begun` go through the decoder again, one a step. Raises ValueError
        for settings out of range or a prompt that does not fit its video, RuntimeError when the model's logits are not
        finite."""
        check_sampling(sampling)
        self._is_interrupted.clear()
        size = sampling.num_completions
        result = [list(group) for group in begun] if begun is not None else [[NOT_BEGUN] * size for _ in prompts]
        are_done = [is_done(group) for group in result]

        def is_cut(chunk: slice, has_ended: Sequence[bool]) -> bool:
            are_done[chunk] = [all(has_ended[row : row + size]) for row in range(0, len(has_ended), size)]
            return self._is_interrupted.is_set() or (quota is not None and quota.is_met(are_done))

        end = 0
        for prompts_of_chunk in in_batches(prompts, sampling, self.max_batch_rows, self.max_batch_tokens):
            chunk = slice(end, end := end + len(prompts_of_chunk))
            rows = [c for group in result[chunk] for c in group]
            if is_cut(chunk, [c.finish_reason != "aborted" for c in rows]) or all(are_done[chunk]):
                continue
            with torch.inference_mode():
                tokens, logprob_SB = self._run_chunk(
                    prompts_of_chunk, chunk.start, sampling, rows, partial(is_cut, chunk)
                )
            rows = self._completions(tokens, logprob_SB, sampling.max_new_tokens)
            result[chunk] = [rows[row : row + size] for row in range(0, len(rows), size)]
            are_done[chunk] = map(is_done, result[chunk])
        return result

    def interrupt(self) -> None:
        """See `RolloutEngine.interrupt`: heard before the next token."""
        self._is_interrupted.set()

    def release_memory(self) -> None:
        """Nothing to lend."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Copy weights in place by their name in the model's state dict. Raises ValueError as `WeightTable.checked`;
        `policy_version` then stays, as do the weights that were copied before."""
        state = self.model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in self._table.checked(weights):
                state[name].copy_(value)
        self.policy_version = policy_version

    @property
    def version(self) -> str:
        """See `RolloutEngine.version`."""
        return f"local, transformers {transformers.__version__}"

    def metrics(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """Let go of the model; the engine cannot be used any more."""
        self.model = self._step = None

    def _run_chunk(
        self,
        prompts: Sequence[Prompt],
        first_index: int,
        sampling: SamplingParams,
        begun: Sequence[Completion],
        is_cut: Callable[[Sequence[bool]], bool],
    ) -> tuple[list[list[int]], Tensor]:
        """Sampled ids of the P * G rows, and their log-probs [S, P * G], on the CPU; what is past a row's ids is noise.

        Rows begin as `begun` says. All ends when all rows ended, or when `is_cut`, told which of them did, says so.
        """
        model, group_size, max_new = self.model, sampling.num_completions, sampling.max_new_tokens
        given_SB = pad_sequence([c.token_ids_R for c in begun], padding_value=-1)[:max_new].to(model.device)
        given_logprob_SB = pad_sequence([c.logprobs_R for c in begun])[:max_new].to(model.device)
        cache, hidden_PD = self._prefill(prompts, sampling)
        batch = _Batch(len(begun), group_size, self._stop_ids)
        numbers = range(first_index, first_index + len(prompts))
        steps = [uniforms(sampling.seed, number, max_new, group_size) for number in numbers]
        uniform_SB = torch.cat(steps, dim=1).to(model.device)
        row_B = torch.arange(len(begun), device=model.device)
        logprob_SB = torch.zeros(max_new, len(begun), device=model.device)
        logits_BV = model.lm_head(hidden_PD).repeat_interleave(group_size, dim=0)
        seen_BV = None  # 0.15 MB a row with 152,064 ids, so only where it is used
        if sampling.repetition_penalty != 1:
            seen_BV = seen_in_prompts(prompts, group_size, logits_BV.shape[1], model.device)
        decode = CapturedStep(self._step) if self._is_captured else self._step
        for step in range(max_new):
            token_B, logprob_B = sample_tokens(logits_BV, uniform_SB[step], sampling, self._suppressed_ids, seen_BV)
            if step < len(given_SB):
                token_B = torch.where(given_SB[step, row_B] >= 0, given_SB[step, row_B], token_B)
            logprob_SB[step].index_copy_(0, row_B, logprob_B)
            if self.on_token is not None:
                self.on_token(token_B)
            batch.add(token_B.cpu().tolist())  # the one wait for the device
            is_over = batch.num_active == 0 or step + 1 == max_new
            if is_over or (step + 1 >= len(given_SB) and is_cut(batch.has_ended)):
                break
            if seen_BV is not None:
                seen_BV.scatter_(1, token_B[:, None], True)
            if 2 * batch.num_active <= len(batch.rows) and (kept := batch.compact()):
                kept_PG = torch.tensor(kept, device=model.device)
                cache.keep(kept_PG)
                kept_B = kept_PG.flatten()
                token_B, row_B, uniform_SB = token_B[kept_B], row_B[kept_B], uniform_SB[:, kept_B]
                seen_BV = seen_BV[kept_B] if seen_BV is not None else None
            cache.begin_token()
            logits_BV = decode(token_B, cache)
        begun_SB = logprob_SB[: len(given_SB)]
        begun_SB.copy_(torch.where(given_SB >= 0, given_logprob_SB, begun_SB))
        return batch.tokens, logprob_SB.cpu()

    def _prefill(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> tuple[GroupedCache, Tensor]:
        """Cache of the prompts, and the hidden state of each one's last token [P, D].

        Prompts are padded on the right: under a causal mask no real token then sees padding, and no mask is needed.
        """
        model, pad_id = self.model, self._stop_ids[-1]
        length_P = torch.tensor([p.token_ids_L.numel() for p in prompts])
        token_ids_PL = pad_sequence([p.token_ids_L for p in prompts], batch_first=True, padding_value=pad_id)
        position_ids_PL3 = pad_sequence([p.position_ids_3L.T for p in prompts], batch_first=True)
        next_position_P = torch.tensor([p.next_position for p in prompts])
        first, last = int(next_position_P.min()), int(next_position_P.max())
        rotary_N2E = self._step.rotary_rows(first, last - first + sampling.max_new_tokens)
        of_prompts = (length_P.to(model.device), (next_position_P - first).to(model.device))
        cache = GroupedCache(of_prompts[0], sampling.num_completions, rotary_N2E, of_prompts[1])
        output = self._family.decoder(model)(
            **self._inputs(prompts, token_ids_PL),
            position_ids=position_ids_PL3.permute(2, 0, 1).to(model.device),
            past_key_values=cache,
            use_cache=True,
        )
        cache.begin_decode()
        return cache, output.last_hidden_state[torch.arange(len(prompts)), length_P - 1]

    def _inputs(self, prompts: Sequence[Prompt], token_ids_PL: Tensor) -> dict[str, Any]:
        """See `ModelFamily.decoder_inputs`; one call of the vision tower, or none where nothing
        is shown. `token_ids_PL`: on the CPU."""
        model = self.model
        for prompt in prompts:
            count, grids = self._family.media_rows(prompt.token_ids_L, model.config).numel(), prompt.grids
            num_tokens = sum(patches.num_tokens for patches in prompt.media)
            if count != num_tokens:
                raise ValueError(
                    f"the prompt of example {prompt.example.id!r} has {count} placeholders, but its grids {grids} "
                    f"stand for {num_tokens} tokens: use PromptBuilder"
                )
        tower, clips = self._family.tower(model), [patches for p in prompts for patches in p.media]
        if clips:
            features_MW = embed_videos(self._family, tower, clips, model.device, model.dtype)
        else:
            features_MW = torch.zeros(0, self._family.feature_width(model.config), device=model.device)
        video_row_M = self._family.media_rows(token_ids_PL, model.config).to(model.device)
        embeds_TD = model.get_input_embeddings()(token_ids_PL.flatten().to(model.device))
        return self._family.decoder_inputs(model, embeds_TD, features_MW, video_row_M, len(prompts))

    def _completions(self, tokens: list[list[int]], logprob_SB: Tensor, max_new_tokens: int) -> list[Completion]:
        """Of all rows. Log-probs are cloned outside inference mode: autograd refuses inference tensors."""
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        result: list[Completion] = []
        for ids, logprob_S, text in zip(tokens, logprob_SB.T, texts, strict=True):
            logprob_R = logprob_S[: len(ids)].clone()
            if not bool(logprob_R.isfinite().all()):
                raise RunError("the model's logits are not finite: its weights diverged or are broken, load others")
            reason: FinishReason = "length" if len(ids) == max_new_tokens else "aborted"
            if ids[-1] in self._stop_ids:
                reason = "stop"
            result.append(Completion(torch.tensor(ids), logprob_R, reason, text))
        return result


class _Batch:
    """Which rows are decoded, and what was drawn for all; on the host. Prompts have the same number of rows each."""

    def __init__(self, num_rows: int, group_size: int, stop_ids: Sequence[int]) -> None:
        self.rows, self.group_size, self._stop_ids = list(range(num_rows)), group_size, stop_ids  # still decoded
        self.tokens: list[list[int]] = [[] for _ in self.rows]  # of all rows there were, to their stop id
        self.has_ended = [False] * num_rows  # the same: whether their stop id was drawn

    @property
    def num_active(self) -> int:
        return self.has_ended.count(False)

    def add(self, tokens: Sequence[int]) -> None:
        """One for each of `rows`; what follows a stop id is noise."""
        for row, token in zip(self.rows, tokens, strict=True):
            if not self.has_ended[row]:
                self.tokens[row].append(token)
                self.has_ended[row] = token in self._stop_ids

    def compact(self) -> list[list[int]]:
        """Drop finished prompts, and finished rows as far as every prompt keeps the same number of rows.

        Gives places among `rows`, a list for each prompt that stays; nothing where nothing can be dropped.
        """
        groups = [range(start, start + self.group_size) for start in range(0, len(self.rows), self.group_size)]
        has_ended = [self.has_ended[row] for row in self.rows]
        num_active = [sum(not has_ended[place] for place in group) for group in groups]
        size = max(num_active)
        kept = [sorted(g, key=has_ended.__getitem__)[:size] for g, n in zip(groups, num_active, strict=True) if n]
        if size * len(kept) == len(self.rows):
            return []
        self.rows, self.group_size = [self.rows[place] for group in kept for place in group], size
        return kept
