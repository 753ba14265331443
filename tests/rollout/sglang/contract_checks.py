"""Run in SGLang's interpreter by test_contract.py: what we send and read, against SGLang's own classes.

Prints one JSON object, check -> "" or what is wrong.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import os
import pickle
import traceback
from types import SimpleNamespace
from typing import Any

import torch

from vcr1_fast.rollout.sgl import update as sglang_update
from vcr1_fast.rollout.sgl import video as sglang_video
from vcr1_fast.rollout.sgl.features import SharedFeatures
from vcr1_fast.rollout.sgl.messages import Message
from vcr1_fast.rollout.sgl.update import CudaHandle, Updater

torch.multiprocessing.set_sharing_strategy("file_system")
FIELDS = {
    "begun_lengths": [0, 0, 0],
    "max_new_tokens": 5,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "stop_ids": [2, 0],
    "suppressed_ids": [3, 4],
    "media": [{"kind": "video", "grid_thw": [2, 4, 4], "second_per_grid_s": 0.5}],
}
TENSORS = {
    "token_ids_L": torch.tensor([1] + [7] * 8 + [2]),
    "position_ids_3L": torch.arange(10).expand(3, -1),
    "values_PC": torch.randn(32, 1176),
    "begun_ids": torch.zeros(0, dtype=torch.int64),
}
SHARED = SharedFeatures.share(TENSORS["values_PC"])


def asked(**changes: Any) -> dict[str, Any]:
    """Arguments of `Engine.async_generate`."""
    [request] = sglang_video.requests_of(FIELDS | changes, TENSORS, {"video": SHARED})
    return request


def engine_arguments() -> None:
    from sglang.srt.server_args import ServerArgs

    known = set(inspect.signature(ServerArgs).parameters)
    unknown = set(json.loads(os.environ["ENGINE_ARGS"])) - known
    assert not unknown, f"ServerArgs has no {sorted(unknown)}"


def generate_arguments() -> None:
    from sglang.srt.entrypoints.engine import Engine

    wanted = {*asked(), "image_data", "custom_logit_processor"}
    missing = wanted - set(inspect.signature(Engine.async_generate).parameters)
    assert not missing, f"async_generate has no {sorted(missing)}"


def request_is_expanded_to_a_group() -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    request = GenerateReqInput(**asked())
    request.normalize_batch_and_arguments()
    assert request.parallel_sample_num == 3 and request.batch_size == 1
    one = request[0]
    assert one.logprob_start_len == -1 and one.return_logprob


def sampling_parameters() -> None:
    from sglang.srt.sampling.sampling_params import SamplingParams

    params: Any = SamplingParams(**asked()["sampling_params"])
    params.normalize(None)
    params.verify(606)
    assert params.n == 3 and params.max_new_tokens == 5 and set(params.stop_token_ids) == {0, 2}
    assert params.logit_bias == {"3": -1e4, "4": -1e4}
    assert params.top_k == 50 and params.repetition_penalty == 1.0
    free: Any = SamplingParams(**asked(top_k=0)["sampling_params"])
    free.normalize(None)
    free.verify(606)
    assert free.top_k >= 606  # all of them
    greedy: Any = SamplingParams(**asked(temperature=0.0)["sampling_params"])
    greedy.normalize(None)
    assert greedy.temperature == 1.0 and greedy.top_k == 1


def video_becomes_one_item() -> None:
    from sglang.srt.managers.schedule_batch import Modality
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor as Base
    from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor as Qwen

    [payload] = asked()["video_data"]
    names = SimpleNamespace(ATTR_NAME_TO_MODALITY={}, FEATURE_NAMES=[])
    source = inspect.getsource(Base.__init__)
    assert all(key in source for key in ("pixel_values_videos", "video_grid_thw", "pixel_values", "image_grid_thw"))
    names.ATTR_NAME_TO_MODALITY = dict.fromkeys(("pixel_values_videos", "video_grid_thw"), Modality.VIDEO)
    names.FEATURE_NAMES = ["pixel_values_videos"]
    [item] = Base.collect_mm_items_from_processor_output(names, payload)  # pyright: ignore
    assert item.modality == Modality.VIDEO and item.hash == payload["hash"]
    for request in (copy.copy(item), item):  # as for each of n + 1 requests
        sent = pickle.dumps(request)
        assert len(sent) < 4096 < TENSORS["values_PC"].nbytes / 30, len(sent)
        assert torch.equal(pickle.loads(sent).feature, TENSORS["values_PC"])
    assert item.video_grid_thw.tolist() == [[1, 4, 4], [1, 4, 4]]
    reader = SimpleNamespace(_get_processor_output_value=Qwen._get_processor_output_value)
    positions, delta = Qwen._get_precomputed_mrope_from_output(reader, payload)  # pyright: ignore
    assert torch.equal(positions, TENSORS["position_ids_3L"]) and delta.tolist() == [[0]]


class RecordingManager:
    """In the place of the tokenizer manager: takes what `Updater` asks of it, if SGLang's own class has such a method,
    sends it through SGLang's coder as it would go to the scheduler, and says that all went well."""

    def __init__(self) -> None:
        from sglang.srt.managers.tokenizer_manager import TokenizerManager

        self.calls: list[tuple[str, Any]] = []
        self._class = TokenizerManager

    def __getattr__(self, name: str) -> Any:
        from sglang.srt.managers.io_struct import FlushCacheReqOutput, msgpack_decode, msgpack_encode

        method = getattr(self._class, name)  # raises AttributeError for what SGLang does not have

        async def record(*arguments: Any) -> Any:
            inspect.signature(method).bind(self, *arguments)
            sent = [msgpack_decode(msgpack_encode(request)) for request in arguments if request is not None]
            self.calls.append((name, *(sent or [None])))
            return FlushCacheReqOutput(success=True) if name == "flush_cache" else (True, "")

        return record

    def take(self) -> list[tuple[str, Any]]:
        calls, self.calls = self.calls, []
        return calls


def _updates(*messages: Message, method: str = "load") -> tuple[list[str], list[Any], Updater]:
    """Names of the calls that the worker's own code makes for these messages, what it gave, and itself."""
    manager = RecordingManager()
    updater = Updater(manager, num_shares=1)
    for message in messages:
        asyncio.run(getattr(updater, method)(message))
    calls = manager.take()
    return [name for name, _ in calls], [request for _, request in calls], updater


def _between_sessions(names: list[str]) -> list[str]:
    """The calls within the one update session, which SGLang has since 0.5.18, before the one that forgets videos."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    if not hasattr(TokenizerManager, "begin_weight_update"):
        assert "begin_weight_update" not in names and "end_weight_update" not in names
        *inside, forgets = names
    else:
        first, *inside, forgets, last = names
        assert (first, last) == ("begin_weight_update", "end_weight_update") and not {first, last} & {*inside}, names
    assert forgets == "update_weights_from_tensor", names
    return inside


def _weights(**changes: Any) -> dict[str, Any]:
    entry = {"name": "w", "dtype": "float32", "shape": [3, 4], "start": 16, "stop": 64, "checksum": [0, 0]}
    one_bucket = {
        "is_first": True,
        "is_last": True,
        "check": False,
        "policy_version": 3,
        "entries": [entry],
    }
    return {"id": 1, **one_bucket, **changes}


def weight_bucket_crosses_the_process_border() -> None:
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    value = torch.randn(3, 4)
    flat_B = torch.cat([torch.zeros(16, dtype=torch.uint8), value.view(-1).view(torch.uint8)])
    message = Message("weights", _weights(source="message"), {"bytes_B": flat_B})
    names, requests, updater = _updates(message)
    assert _between_sessions(names) == ["update_weights_from_tensor"] and updater.policy_version == 3
    request = requests[names.index("update_weights_from_tensor")]
    assert (request.load_format, request.flush_cache, request.weight_version) == ("flattened_bucket", True, "3")
    got: Any = MultiprocessingSerializer.deserialize(request.serialized_named_tensors[0])
    bucket: Any = FlattenedTensorBucket(flattened_tensor=got["flattened_tensor"], metadata=got["metadata"])
    [(name, back)] = bucket.reconstruct_tensors()
    assert name == "w" and torch.equal(back, value)


def only_the_last_bucket_sets_the_version() -> None:
    flat_B = torch.zeros(64, dtype=torch.uint8)
    first = Message("weights", _weights(source="message", is_last=False), {"bytes_B": flat_B})
    names, requests, updater = _updates(first)
    request = requests[names.index("update_weights_from_tensor")]
    assert (request.flush_cache, request.weight_version, updater.policy_version) == (False, None, -1)
    assert "end_weight_update" not in names


def weights_by_broadcast() -> None:
    from sglang.srt.managers.io_struct import UpdateWeightsFromDistributedReqInput

    names, requests, _ = _updates(Message("weights", _weights(source="broadcast", group="g"), {}))
    assert _between_sessions(names) == ["update_weights_from_distributed"]
    request = requests[names.index("update_weights_from_distributed")]
    assert isinstance(request, UpdateWeightsFromDistributedReqInput)
    assert (request.names, request.dtypes, request.shapes, request.group_name) == (["w"], ["float32"], [[3, 4]], "g")


def update_group() -> None:
    fields = {"leaves": "old", "address": "10.0.0.1", "port": 29801, "rank": 1, "size": 2, "name": "g"}
    names, requests, _ = _updates(Message("group", {"id": 1, "backend": "gloo", **fields}, {}), method="join")
    assert names == ["destroy_weights_update_group", "init_weights_update_group"]
    assert requests[0].group_name == "old"
    joined = requests[1]
    assert (joined.master_address, joined.master_port, joined.group_name) == ("10.0.0.1", 29801, "g")
    assert (joined.rank_offset, joined.world_size, joined.backend) == (1, 2, "gloo")


def memory_by_tags() -> None:
    tags = ["weights", "kv_cache", "cuda_graph"]
    orders = [Message("memory", {"id": 1, "action": action, "tags": tags}, {}) for action in ("release", "resume")]
    names, requests, _ = _updates(*orders, method="memory")
    assert names == ["flush_cache", "release_memory_occupation", "resume_memory_occupation"]
    assert [request.tags for request in requests[1:]] == [sorted(tags)] * 2


def cuda_handle_is_rebuilt_by_sglang() -> None:
    """As far as a machine without a GPU goes: the function exists, is let through, and takes these arguments."""
    from sglang.srt.utils import patch_torch
    from torch.multiprocessing import reductions

    handles = ["", 0, 0, False, "", 0, "", False]
    handle = {"num_bytes": 0, "tensor_offset": 0, "device_uuid": "GPU-0", "handles": handles}
    rebuild, arguments = CudaHandle(handle).__reduce__()
    assert rebuild is patch_torch._rebuild_cuda_tensor_modified
    bound = inspect.signature(reductions.rebuild_cuda_tensor).bind(*arguments).arguments
    assert bound["storage_device"] == "GPU-0" and list(bound).index("storage_device") == 6


def answers_have_what_is_read() -> None:
    from sglang.srt.managers import schedule_batch
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    kinds = {
        "stop": schedule_batch.FINISH_MATCHED_TOKEN(matched=2),
        "length": schedule_batch.FINISH_LENGTH(length=5),
        "abort": schedule_batch.FINISH_ABORT("late"),
    }
    assert {kind: reason.to_json()["type"] for kind, reason in kinds.items()} == {kind: kind for kind in kinds}
    source = inspect.getsource(TokenizerManager)
    for name in ("finish_reason", "weight_version", "output_token_logprobs"):
        assert f'"{name}"' in source, f"SGLang's answers have no {name}"


def a_restart_beside_a_learner_gets_its_whole_cache() -> None:
    """A bfloat16 7B on a GPU with 26 GiB free: SGLang's own sums give all tokens of the plan."""
    from sglang.srt.mem_cache import kv_cache_configurator as configurator

    told = json.loads(os.environ["ENGINE_ARGS"])
    schedule = SimpleNamespace(mem_fraction_static=told["mem_fraction_static"], max_total_tokens=None)
    free = {"before": 26.0, "after": 26.0 - 2 * 8_292_166_656 / 2**30}
    parallel = SimpleNamespace(launch_world_size=1, pp_size=1, world_group=SimpleNamespace(cpu_group=None))
    one = SimpleNamespace(world_size=1, cpu_group=None)
    fakes = {"get_available_gpu_memory": lambda *_, **__: free["after"], "get_schedule": lambda: schedule}
    fakes |= {"get_parallel": lambda: parallel, "get_mm": lambda: SimpleNamespace(mm_feature_transport=None)}
    fakes["get_world_group"] = lambda: one  # 0.5.17's
    for name, fake in fakes.items():
        if hasattr(configurator, name):
            setattr(configurator, name, fake)
    asked = SimpleNamespace(device="cuda", gpu_id=0, mambaish_config=None, post_capture_kv_active=False)
    asked.model_config = SimpleNamespace(is_multimodal=True)
    asked.server_args = SimpleNamespace(pp_size=1)
    cache = configurator.KVCacheConfigurator
    num_bytes = cache._profile_available_bytes(asked, free["before"])  # pyright: ignore
    num_tokens = num_bytes // 57_344
    assert num_tokens > told["max_total_tokens"] == 131_072, num_tokens
    schedule.max_total_tokens = told["max_total_tokens"]
    assert cache._apply_token_constraints(asked, num_tokens) == told["max_total_tokens"]  # pyright: ignore
    schedule.mem_fraction_static = 0.35  # a share of what is free, which the learner's memory makes small
    try:
        cache._profile_available_bytes(asked, free["before"])  # pyright: ignore
    except (ValueError, RuntimeError):
        pass
    else:
        raise AssertionError("a share of 0.35 would do as well")


def a_token_takes_as_much_of_the_cache_as_the_plan_says() -> None:
    """Of a bfloat16 7B: 2 x 28 layers x 4 heads x 128 x 2 bytes; SGLang's cache has a page more than its tokens."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    sizes = {"size": 15, "page_size": 1, "head_num": 4, "head_dim": 128, "layer_num": 28}
    pool: Any = MHATokenToKVPool(**sizes, dtype=torch.bfloat16, device="cpu", enable_memory_saver=False)
    assert sum(pool.get_kv_size_bytes()) == 16 * 57_344, pool.get_kv_size_bytes()


def check_loader_is_found() -> None:
    from sglang.srt.utils import dynamic_import

    assert dynamic_import(sglang_update.CHECK_LOADER).__name__ == "compare"


def the_cache_of_videos_is_found_and_emptied() -> None:
    from sglang.srt.managers import mm_utils
    from sglang.srt.mem_cache.multimodal_cache import EmbeddingResult
    from sglang.srt.utils import dynamic_import

    mm_utils.init_mm_embedding_cache(1 << 20)
    try:
        from sglang.srt.managers.mm_schedule import embedding_cache
    except ImportError:
        from sglang.srt.managers.mm_utils import embedding_cache
    assert embedding_cache is not None
    embedding_cache.set(7, EmbeddingResult(embedding=torch.ones(4, 4)))
    assert embedding_cache.get_single(7) is not None
    dynamic_import(sglang_update.FORGET_LOADER)(torch.nn.Linear(1, 1), [("nothing", torch.zeros(1))])
    assert embedding_cache.get_single(7) is None and embedding_cache.current_size == 0


CHECKS = [
    engine_arguments,
    generate_arguments,
    request_is_expanded_to_a_group,
    sampling_parameters,
    video_becomes_one_item,
    weight_bucket_crosses_the_process_border,
    only_the_last_bucket_sets_the_version,
    weights_by_broadcast,
    update_group,
    memory_by_tags,
    cuda_handle_is_rebuilt_by_sglang,
    answers_have_what_is_read,
    a_restart_beside_a_learner_gets_its_whole_cache,
    a_token_takes_as_much_of_the_cache_as_the_plan_says,
    check_loader_is_found,
    the_cache_of_videos_is_found_and_emptied,
]


def main() -> None:
    results = {}
    for check in CHECKS:
        try:
            check()
            results[check.__name__] = ""
        except Exception:
            results[check.__name__] = traceback.format_exc(limit=-3)
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
