"""Run in SGLang's interpreter by test_contract.py: what we send and read, against SGLang's own classes.

Prints one JSON object, check -> "" or what is wrong.
"""

from __future__ import annotations

import inspect
import json
import os
import traceback
from types import SimpleNamespace
from typing import Any

import torch

from vcr1_fast.rollout import sglang_video, sglang_worker

torch.multiprocessing.set_sharing_strategy("file_system")
FIELDS = {
    "num_completions": 3,
    "max_new_tokens": 5,
    "temperature": 0.7,
    "top_p": 0.9,
    "stop_ids": [2, 0],
    "suppressed_ids": [3, 4],
    "grid_thw": [2, 4, 4],
    "second_per_grid_s": 0.5,
}
TENSORS = {
    "token_ids_L": torch.tensor([1] + [7] * 8 + [2]),
    "position_ids_3L": torch.arange(10).expand(3, -1),
    "values_PC": torch.randn(32, 1176),
}


def engine_arguments() -> None:
    from sglang.srt.server_args import ServerArgs

    known = set(inspect.signature(ServerArgs).parameters)
    unknown = set(json.loads(os.environ["ENGINE_ARGS"])) - known
    assert not unknown, f"ServerArgs has no {sorted(unknown)}"


def generate_arguments() -> None:
    from sglang.srt.entrypoints.engine import Engine

    wanted = {"input_ids", "sampling_params", "video_data", "return_logprob", "logprob_start_len", "token_ids_logprob"}
    missing = wanted - set(inspect.signature(Engine.async_generate).parameters)
    assert not missing, f"async_generate has no {sorted(missing)}"


def request_is_expanded_to_a_group() -> None:
    from sglang.srt.managers.io_struct import GenerateReqInput

    request = GenerateReqInput(
        input_ids=TENSORS["token_ids_L"].tolist(),
        sampling_params=sglang_video.sampling_params(FIELDS),
        video_data=[sglang_video.video_item(FIELDS, TENSORS, 1)],
        return_logprob=True,
        logprob_start_len=-1,
        token_ids_logprob=FIELDS["suppressed_ids"],
    )
    request.normalize_batch_and_arguments()
    assert request.parallel_sample_num == 3 and request.batch_size == 1
    one = request[0]
    assert one.token_ids_logprob == [3, 4] and one.logprob_start_len == -1 and one.return_logprob


def sampling_parameters() -> None:
    from sglang.srt.sampling.sampling_params import SamplingParams

    params: Any = SamplingParams(**sglang_video.sampling_params(FIELDS))
    params.normalize(None)
    params.verify(606)
    assert params.n == 3 and params.max_new_tokens == 5 and set(params.stop_token_ids) == {0, 2}
    assert params.logit_bias == {"3": -35.0, "4": -35.0}
    greedy: Any = SamplingParams(**sglang_video.sampling_params(FIELDS | {"temperature": 0.0}))
    greedy.normalize(None)
    assert greedy.temperature == 1.0 and greedy.top_k == 1


def video_becomes_one_item() -> None:
    from sglang.srt.managers.schedule_batch import Modality
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor as Base
    from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor as Qwen

    payload = sglang_video.video_item(FIELDS, TENSORS, 1)
    names = SimpleNamespace(ATTR_NAME_TO_MODALITY={}, FEATURE_NAMES=[])
    source = inspect.getsource(Base.__init__)
    assert all(key in source for key in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"))
    names.ATTR_NAME_TO_MODALITY = dict.fromkeys(
        ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"), Modality.VIDEO
    )
    names.FEATURE_NAMES = ["pixel_values_videos"]
    [item] = Base.collect_mm_items_from_processor_output(names, payload)  # pyright: ignore
    assert item.modality == Modality.VIDEO and item.hash == payload["hash"]
    assert torch.equal(item.feature, TENSORS["values_PC"])
    assert item.video_grid_thw.tolist() == [[1, 4, 4], [1, 4, 4]]
    reader = SimpleNamespace(_get_processor_output_value=Qwen._get_processor_output_value)
    positions, delta = Qwen._get_precomputed_mrope_from_output(reader, payload)  # pyright: ignore
    assert torch.equal(positions, TENSORS["position_ids_3L"]) and delta.tolist() == [[0]]


def weight_bucket_crosses_the_process_border() -> None:
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    value = torch.randn(3, 4)
    entry = {"name": "w", "dtype": "float32", "shape": [3, 4], "start": 16, "stop": 64}
    flat = torch.cat([torch.zeros(16, dtype=torch.uint8), value.view(-1).view(torch.uint8)])
    payload = {"flattened_tensor": flat, "metadata": [sglang_worker._metadata(entry)]}
    raw = MultiprocessingSerializer.serialize(payload)
    UpdateWeightsFromTensorReqInput(
        serialized_named_tensors=[raw], load_format="flattened_bucket", flush_cache=True, weight_version="3"
    )
    got: Any = MultiprocessingSerializer.deserialize(raw)
    bucket: Any = FlattenedTensorBucket(flattened_tensor=got["flattened_tensor"], metadata=got["metadata"])
    [(name, back)] = bucket.reconstruct_tensors()
    assert name == "w" and torch.equal(back, value)


def update_session() -> None:
    from sglang.srt.managers import io_struct
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    assert hasattr(TokenizerManager, "update_weights_from_tensor")
    if hasattr(TokenizerManager, "begin_weight_update"):
        io_struct.BeginWeightUpdateReqInput()
        io_struct.EndWeightUpdateReqInput()
        assert hasattr(TokenizerManager, "end_weight_update")


def check_loader_is_found() -> None:
    from sglang.srt.utils import dynamic_import

    assert dynamic_import(sglang_worker.CHECK_LOADER).__name__ == "compare"


CHECKS = [
    engine_arguments,
    generate_arguments,
    request_is_expanded_to_a_group,
    sampling_parameters,
    video_becomes_one_item,
    weight_bucket_crosses_the_process_border,
    update_session,
    check_loader_is_found,
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
