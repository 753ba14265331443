"""A request as SGLang wants it: videos and pictures as finished patches with explicit positions, log-probs as the
learner's.

Called by the worker, in SGLang's interpreter: only the standard library and torch. `media` is what the prompt shows, in
its order: {"kind": "video" or "image", "grid_thw", "second_per_grid_s"} each. One tensor has the rows of all of them in
that order: `values_PC`, or `embeddings_MD` of a frozen tower. What is fixed here, and why (all found with SGLang 0.5.17
to 0.5.23; tests/rollout/sglang runs the real engine against the learner):

- Qwen2.5-VL's tower lets its full-attention blocks see all frames of one grid row at once in SGLang, one frame pair in
  the model's own code. Sent as t rows [1, h, w], a video gives the same embeddings in both; as one row [t, h, w] it is
  1 nat off. Qwen3-VL's tower sees one frame pair in both; its embeddings have those for inner layers beside them.
- Positions are ours (prompts/positions.py); SGLang would read seconds per grid step from elsewhere. Without videos and
  pictures it counts the tokens itself.
- SGLang keeps what its tower made by the item's hash and does not drop it when weights change: each load empties that
  cache (check.forget_videos). Left out, answers after an update were 2 to 3 nats off.
- Pictures' ids are kept from being drawn by a bias on their logits, which SGLang leaves in its log-probs: those of the
  learner are over the other ids, too. To have theirs back instead (`token_ids_logprob`) would cost SGLang a copy to the
  GPU and one from it for each row and step.
- top_k and top_p leave its log-probs as they are. It draws from the tokens that are among the k largest and whose
  larger ones have a mass below top_p, before anything is cut (flashinfer's "joint" order; transformers takes the mass
  of what top_k keeps). top_k 1 is greedy to it, and then it scores at temperature 1.
- Its repetition_penalty looks at the tokens of the answer alone: it is never asked for, penalty.py stands in for it.

Shape letters: L prompt tokens, P patches, C values of a patch, M tokens of videos and pictures, R completion tokens.
D is what the tower gives for one token: the model's width, in Qwen3-VL several times that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.rollout.sgl.penalty import request_arguments

SUPPRESSED_BIAS = -1e4  # on the logit of an id that is never drawn: exp of it is 0
MERGE = 2  # patches along each side of one token
Media = Sequence[Mapping[str, Any]]
KINDS = ("video", "image")
_FEATURES = {"video": "pixel_values_videos", "image": "pixel_values"}  # SGLang's names


def check_request(fields: Mapping[str, Any], tensors: Mapping[str, Tensor], limits: Mapping[str, int]) -> None:
    """Raises ValueError for a request that SGLang would answer wrongly or die of.

    An id outside of the vocabulary, for example, is an index error in its scheduler, which ends all its processes.
    `limits`: vocabulary_size, video_token_id, image_token_id, patch_values (C), feature_width (D), context_length,
    num_cache_tokens (of the whole engine).
    """
    ids_L, positions_3L = tensors["token_ids_L"], tensors["position_ids_3L"]
    length, vocabulary = ids_L.numel(), limits["vocabulary_size"]
    if ids_L.ndim != 1 or ids_L.dtype != torch.int64 or length == 0:
        raise ValueError(f"token_ids_L is {ids_L.dtype} {tuple(ids_L.shape)}, wanted int64 [L], not empty")
    named = torch.tensor([*fields["stop_ids"], *fields["suppressed_ids"]], dtype=torch.int64)
    for name, ids in (
        ("the prompt", ids_L),
        ("a begun answer", tensors["begun_ids"]),
        ("stop or suppressed ids", named),
    ):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(
                f"{name} has ids from {int(ids.min())} to {int(ids.max())}, but the vocabulary is 0 .. {vocabulary - 1}"
            )
    if positions_3L.dtype != torch.int64 or tuple(positions_3L.shape) != (3, length):
        raise ValueError(f"positions are {positions_3L.dtype} {tuple(positions_3L.shape)}, wanted int64 [3, {length}]")
    if int(positions_3L.min()) < 0:
        raise ValueError(f"a position is {int(positions_3L.min())}, wanted >= 0")
    _check_sampling(fields, length, limits)
    _check_media(fields["media"], tensors, limits)


def _check_sampling(fields: Mapping[str, Any], length: int, limits: Mapping[str, int]) -> None:
    lengths, max_new_tokens = fields["begun_lengths"], fields["max_new_tokens"]
    if not lengths or not 0 <= min(lengths) <= max(lengths) < max_new_tokens:
        raise ValueError(f"completions of {lengths} tokens may get up to {max_new_tokens}, wanted at least one of each")
    if not fields["temperature"] >= 0 or not 0 < fields["top_p"] <= 1:
        raise ValueError(
            f"temperature is {fields['temperature']} and top_p {fields['top_p']}, wanted >= 0 and in (0, 1]"
        )
    if not fields["repetition_penalty"] > 0:
        raise ValueError(f"repetition_penalty is {fields['repetition_penalty']}, wanted > 0")
    if fields["top_k"] != 0 and fields["top_k"] < 2:
        raise ValueError(f"top_k is {fields['top_k']}, wanted 0 (all) or >= 2")
    room = min(limits["context_length"], limits["num_cache_tokens"])
    if length + max_new_tokens > room:
        raise ValueError(
            f"the prompt has {length} tokens and may get {max_new_tokens} more, but the engine has room for {room}: "
            "lower rollout.max_new_tokens or the tokens of videos, or give the engine more cache"
        )


def _check_media(media: Media, tensors: Mapping[str, Tensor], limits: Mapping[str, int]) -> None:
    for medium in media:
        kind, (t, h, w) = medium["kind"], medium["grid_thw"]
        is_grid = t >= 1 and h >= MERGE and w >= MERGE and h % MERGE == 0 and w % MERGE == 0
        if kind not in KINDS or not is_grid or (kind == "image" and t != 1):
            raise ValueError(
                f"it shows {kind!r} of the grid {(t, h, w)}, wanted one of {', '.join(KINDS)}, h and w multiples "
                f"of {MERGE}, t >= 1 and of an image 1"
            )
    positions_3L = tensors["position_ids_3L"]
    if not media and not torch.equal(positions_3L, torch.arange(positions_3L.shape[1]).expand(3, -1)):
        raise ValueError("a prompt of text alone has other positions than 0, 1, 2, ..., which SGLang would give it")
    features, has_embeddings = features_of(tensors), "embeddings_MD" in tensors
    wanted = (sum(num_rows(media, has_embeddings)), limits["feature_width" if has_embeddings else "patch_values"])
    if media and (tuple(features.shape) != wanted or not features.is_floating_point()):
        raise ValueError(
            f"{'embeddings' if has_embeddings else 'patches'} are {features.dtype} {tuple(features.shape)} with the "
            f"grids {[tuple(medium['grid_thw']) for medium in media]}, wanted floating point {list(wanted)}"
        )
    _check_places(media, tensors["token_ids_L"], limits)
    if not bool(features.isfinite().all()):
        raise ValueError("the values of videos and pictures are not all finite")


def _check_places(media: Media, token_ids_L: Tensor, limits: Mapping[str, int]) -> None:
    """The placeholders of a medium stand in one place or, of a video, in one for each pair of frames."""
    runs = [(run, kind) for kind in KINDS for run in placeholder_runs(token_ids_L, limits[f"{kind}_token_id"])]
    found = [(kind, last + 1 - first) for (first, last), kind in sorted(runs)]
    wanted: list[tuple[str, int]] = []
    for medium, count in zip(media, num_rows(media, merged=True), strict=True):
        kind, t = medium["kind"], medium["grid_thw"][0]
        pairs = [(kind, count // t)] * t
        wanted += pairs if found[len(wanted) : len(wanted) + t] == pairs else [(kind, count)]
    if found != wanted:
        raise ValueError(
            f"placeholders stand in {len(found)} places, {found[:8]}, wanted {len(wanted)}, {wanted[:8]}, or for a "
            "video one for each pair of frames"
        )


def features_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """The patches, or what a frozen tower made of them; of a prompt of text alone empty."""
    return tensors.get("embeddings_MD", tensors.get("values_PC", torch.empty(0)))


def num_rows(media: Media, merged: bool) -> list[int]:
    """Of each medium: its patches or, `merged`, its tokens."""
    return [math.prod(medium["grid_thw"]) // (MERGE**2 if merged else 1) for medium in media]


def features_by_kind(media: Media, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of all videos and of all pictures, for those kinds that the prompt shows."""
    features, kinds = features_of(tensors), [medium["kind"] for medium in media]
    if len(set(kinds)) <= 1:
        return dict.fromkeys(kinds, features)
    parts = list(zip(kinds, features.split(num_rows(media, "embeddings_MD" in tensors)), strict=True))
    return {kind: torch.cat([part for of, part in parts if of == kind]) for kind in sorted(set(kinds))}


def media_item(kind: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], features: Tensor) -> dict[str, Any]:
    """SGLang's `processor_output` form of all videos of a prompt, or of all its pictures, but for positions."""
    own = [medium for medium in fields["media"] if medium["kind"] == kind]
    positions_3L = tensors["position_ids_3L"]
    delta = int(positions_3L.max()) + 1 - positions_3L.shape[1]
    content: dict[str, Any] = {_FEATURES[kind]: features}
    if "embeddings_MD" in tensors:
        content = {"modality": kind.upper(), "precomputed_embeddings": features}
    return {
        "format": "processor_output",
        **content,
        f"{kind}_grid_thw": torch.tensor([[1, h, w] for t, h, w in (m["grid_thw"] for m in own) for _ in range(t)]),
        "mrope_position_delta": torch.tensor([[delta]]),
        "hash": item_hash(features, own),
    }


def placeholder_runs(token_ids_L: Tensor, token_id: int) -> list[tuple[int, int]]:
    """First and last place of each unbroken run of one placeholder."""
    places = (token_ids_L == token_id).nonzero().squeeze(1)
    ends = torch.cat([places.diff() > 1, torch.ones(min(1, len(places)), dtype=torch.bool)])
    starts = torch.cat([ends[-1:], ends[:-1]])
    return list(zip(places[starts].tolist(), places[ends].tolist(), strict=True))


def item_hash(features: Tensor, media: Media) -> int:
    """63 bits from patches or embeddings, grids, and seconds, on which positions depend. 40 MB of pixels take 40 ms."""
    digest = hashlib.blake2b(json.dumps(media, sort_keys=True).encode(), digest_size=8)
    digest.update(features.contiguous().view(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "little") >> 1


def requests_of(
    fields: Mapping[str, Any], tensors: Mapping[str, Tensor], features: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Arguments of `Engine.async_generate`; `features`: see `features_by_kind`.

    One request for completions that all begin with their first token: SGLang itself reads their prompt once. Where some
    go on, one that draws nothing comes first, and then one for each: of requests that come together, SGLang would find
    the prompt of none in its cache (measured: 0 of 701 tokens for 13 of 16 answers).
    """
    items = {kind: media_item(kind, fields, tensors, of_kind) for kind, of_kind in features.items()}
    prompt_ids_L, positions_3L, lengths = tensors["token_ids_L"], tensors["position_ids_3L"], fields["begun_lengths"]
    next_position = int(positions_3L.max()) + 1

    def request(begun_R: Tensor, **own: int) -> dict[str, Any]:
        ids_L = torch.cat([prompt_ids_L, begun_R])
        own_R = next_position + torch.arange(len(begun_R))
        positions = {"mrope_positions": torch.cat([positions_3L, own_R.expand(3, -1)], dim=1)}
        arguments, sampling = request_arguments(fields["repetition_penalty"], ids_L)
        return {
            "input_ids": ids_L.tolist(),
            "sampling_params": sampling_params(fields) | sampling | own,
            "return_logprob": True,
            "logprob_start_len": -1,
            **{f"{kind}_data": [item | positions] for kind, item in items.items()},
            **arguments,
        }

    begun, most = tensors["begun_ids"].split(lengths), fields["max_new_tokens"]
    if not any(lengths):
        return [request(begun[0], n=len(lengths), max_new_tokens=most)]
    rest = [request(begun_R, max_new_tokens=most - len(begun_R)) for begun_R in begun]
    return [request(begun[0][:0], max_new_tokens=0), *rest]


def sampling_params(fields: Mapping[str, Any]) -> dict[str, Any]:
    """SGLang's sampling parameters but for `n` and `max_new_tokens`. Its temperature 0 is greedy, with log-probs at
    temperature 1, as ours."""
    return {
        "temperature": fields["temperature"],
        "top_p": fields["top_p"],
        "top_k": fields["top_k"] or -1,
        "stop_token_ids": list(fields["stop_ids"]),
        "logit_bias": {str(i): SUPPRESSED_BIAS for i in fields["suppressed_ids"]},
        "skip_special_tokens": False,
    }


def completion_tensors(meta: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(token_ids_R int64, logprobs_R float32) of one completion from the meta_info of SGLang's answer."""
    entries: Sequence[Sequence[Any]] = meta.get("output_token_logprobs") or []  # cut short before its first token
    token_R = torch.tensor([entry[1] for entry in entries], dtype=torch.int64)
    return token_R, torch.tensor([entry[0] for entry in entries])
