"""The dispatch mode: operations on CUDA tensors are done on their shapes, those on CPU tensors for real."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
import torch._subclasses.fake_tensor as fake_tensor
import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vcr1_kernels.flash_routes import flash_ops

from vcr1_fast.fake_gpu import costs, cuda_module, flash_packages, triton_launches
from vcr1_fast.fake_gpu.flash_packages import FlashVersion
from vcr1_fast.fake_gpu.meter import Meter

_c10d: Any = dist.distributed_c10d
_OWN = ("vcr1_kernels", "vcr1_fast")  # namespaces of our own operators
_MAX_KNOWN_BYTES = 64 << 20  # of a host buffer whose values are remembered on the device


class FakeGpu(TorchDispatchMode):
    """Within it `device="cuda"` makes fake tensors. One for a process: cached tensors of a second one would mix.

    Values are known of what was copied from the host and only viewed since: segment lengths of attention calls are read
    back from there. Everything else reads as 0, or as a 1 where one number is asked for.
    """

    def __init__(self, num_gpus: int) -> None:
        super().__init__()
        self.meter = Meter()
        self.is_planning = False  # DTensor asks for the shape of a result by doing the operation on whole tensors
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.library = torch.library.Library("aten", "IMPL")  # what it registers lives as long as it
        self._pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, Tensor] = weakref.WeakKeyDictionary()
        cuda_module.install(num_gpus, self._waited)
        triton_launches.install(self._launched)
        self._installed_flash: FlashVersion | None = flash_packages.installed_version()
        _patch_torch(self)

    def use_flash(self, version: FlashVersion | None) -> None:
        """Which version of flash-attn seems to be installed. None: what this environment has."""
        flash_packages.install(version or self._installed_flash, self._package_attention)
        flash_ops.cache_clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it takes itself apart first
        leaves = tree_leaves((args, kwargs))
        namespace, _, name = func._schema.name.partition("::")
        if not any(isinstance(x, FakeTensor) for x in leaves) and not _is_cuda(kwargs.get("device")):
            return self._on_host(func, namespace, name, args, kwargs)
        if namespace in _OWN:
            return self._own_operator(func, args, kwargs)
        if namespace == "aten" and _only_decomposes(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        read_back = self._reading(name, args, kwargs)
        if read_back is not None:
            return read_back
        with self.fake:
            out = func(*args, **kwargs)
        if self.is_planning:
            return out
        self._remember(name, args, kwargs, out)
        self._count(namespace, name, args, kwargs, out)
        for x in tree_leaves(out):
            if isinstance(x, FakeTensor) and x.device.type == "cuda":
                self.meter.memory.see(x)
        return out

    def _on_host(self, func: Any, namespace: str, name: str, args: Any, kwargs: Any) -> Any:
        if name == "is_pinned":
            return args[0].untyped_storage() in self._pinned
        is_pinned = kwargs.get("pin_memory", False)
        out = func(*args, **(kwargs | {"pin_memory": False} if is_pinned else kwargs))
        if is_pinned:
            self.pin(out)
        if namespace in ("c10d", "_c10d_functional"):
            self.meter.collectives.append((f"host {name}", _largest_bytes((args, kwargs))))
        return out

    def pin(self, tensor: Tensor) -> None:
        """Its copies to the GPU wait for nobody."""
        self._pinned.add(tensor.untyped_storage())

    def _own_operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operator's own code instead of its shapes: allocations, copies and launches in it then count."""
        definition = OPDEFS[func._schema.name]
        implementation = definition._backend_fns.get("cuda") or definition._backend_fns.get(None) or definition._init_fn
        with self, torch.no_grad():
            return implementation(*args, **kwargs)

    def _reading(self, name: str, args: Any, kwargs: Any) -> Any:
        """Note waits and copies between host and GPU; the value, where one is asked for on the host."""
        if name == "_local_scalar_dense":
            self._waited("item")
            known = self.values(args[0])
            if known is not None:
                return known.item()
            return 1.0 if args[0].dtype.is_floating_point else int(args[0].dtype != torch.bool)
        if name in ("_to_copy", "copy_"):
            target, source = (args[0], args[1]) if name == "copy_" else (None, args[0])
            device = torch.device(kwargs.get("device") or source.device) if target is None else target.device
            if source.device.type == "cuda" and device.type == "cpu":
                self._waited("copy to the host")
                known = self.values(source)
                if target is not None:
                    return target.zero_() if known is None else target.copy_(known)
                dtype = kwargs.get("dtype") or source.dtype
                return torch.zeros(source.shape, dtype=dtype) if known is None else known.to(dtype)
            if source.device.type == "cpu" and device.type == "cuda":
                asked = kwargs.get("non_blocking", len(args) > 2 and args[2])
                self._copied(source, bool(asked))
        if name == "nonzero":  # as if everything were: what follows is then as large as it can be
            self._waited(name)
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        if name in costs.READS_VALUES or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self._waited(name)
        if name.startswith(("index", "_index_put_impl")) and len(args) > 1 and isinstance(args[1], list | tuple):
            indices = [x for x in args[1] if isinstance(x, Tensor)]
            if any(x.dtype == torch.bool for x in indices):
                self._waited("index by bool")
            for x in indices:
                if x.device.type == "cpu" and x.ndim and args[0].device.type == "cuda":
                    self._copied(x, False)
        return None

    def _copied(self, source: Tensor, is_asynchronous: bool) -> None:
        """One copy to the GPU. It returns at once only from pinned memory."""
        is_asynchronous = is_asynchronous and source.untyped_storage() in self._pinned
        (self.meter.copies if is_asynchronous else self.meter.blocking_copies)[_site()] += 1

    def _waited(self, what: str) -> None:
        self.meter.syncs[f"{what} at {_site()}"] += 1

    def _remember(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Keep the values of a host buffer that was copied as it is; forget those of a storage that is written."""
        if name in ("_to_copy", "copy_"):
            target, source = (args[0], args[1]) if name == "copy_" else (out, args[0])
            num_bytes = source.numel() * source.element_size()
            is_same = source.dtype == target.dtype and source.is_contiguous() and target.storage_offset() == 0
            is_whole = is_same and target.untyped_storage().nbytes() == num_bytes
            is_index = not source.is_floating_point() and num_bytes <= _MAX_KNOWN_BYTES
            if source.device.type == "cpu" and is_whole and is_index:
                self._known[target.untyped_storage()] = source.detach().clone().flatten().view(torch.uint8)
                return
        if name.endswith("_") and args and isinstance(args[0], Tensor):
            self._known.pop(args[0].untyped_storage(), None)

    def values(self, tensor: Tensor) -> Tensor | None:
        """What a fake tensor holds, on the host; None where that is not known."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        known = self._known.get(tensor.untyped_storage())
        if known is None or not tensor.is_contiguous():
            return None
        start = tensor.storage_offset() * tensor.element_size()
        part = known[start : start + tensor.numel() * tensor.element_size()].clone()
        return part.view(tensor.dtype).view(tensor.shape)

    def _count(self, namespace: str, name: str, args: Any, kwargs: Any, out: Any) -> None:
        meter = self.meter
        if namespace in ("c10d", "_c10d_functional"):
            if "wrap_tensor" not in name and "wait_tensor" not in name:
                meter.communicate(name, _largest_bytes((args, kwargs)), _ranks((args, kwargs)))
            return
        if name in costs.NO_KERNEL:
            return
        launches = costs.num_launches(name, args)
        if name.startswith(("_flash_attention", "_scaled_dot_product")):
            num_bytes = costs.moved_bytes(args, kwargs, out)
            meter.note(costs.attention_name("backward" in name), launches=launches, num_bytes=num_bytes)
        if name.startswith("_flash_attention"):
            is_backward = "backward" in name
            query, (cu_q, cu_k) = args[is_backward], args[6:8] if is_backward else args[3:5]
            self._count_attention(query, cu_q, cu_k, args[11 if is_backward else 8], is_backward)
            return
        if name.startswith("_scaled_dot_product"):
            is_backward = "backward" in name
            query, key = args[1:3] if is_backward else args[:2]
            batch, heads, num_queries, width = query.shape
            place = 11 if is_backward else 6 if "efficient" in name else 4
            is_causal = len(args) > place and args[place]  # trailing defaults are left out
            flop = costs.attention_flop(heads * width, [num_queries], [key.shape[2]], bool(is_causal))
            self.add_attention(batch * flop, is_backward)
            return
        flop, num_bytes = costs.gemm_flop(name, args), costs.moved_bytes(args, kwargs, out)
        # the copy into an all-gather's buffer reads and writes a shard, not the whole buffer that it returns
        num_bytes = 0 if name == "all_gather_copy_in" else num_bytes
        seconds = meter.rates.kernel_seconds(flop, num_bytes)
        done = flop or costs.num_operations(args, out)
        kernel = f"{costs.GEMM}, {name}" if flop else name
        meter.note(kernel, launches=launches, flop=done, num_bytes=num_bytes, seconds=seconds)

    def _package_attention(
        self, query: Tensor, cu_q: Tensor, cu_k: Tensor, is_causal: bool, is_backward: bool, version: FlashVersion
    ) -> None:
        # query and result, keys and values at most as wide; backward reads these and the gradient, writes three
        self.meter.note(costs.attention_name(is_backward), num_bytes=(8 if is_backward else 4) * query.nbytes)
        self._count_attention(query, cu_q, cu_k, is_causal, is_backward, version)

    def _count_attention(
        self,
        query: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        is_causal: bool,
        is_backward: bool,
        version: FlashVersion = "fa2",
    ) -> None:
        """Variable-length attention between segments."""
        ends_q, ends_k = self.values(cu_q), self.values(cu_k)
        if ends_q is None or ends_k is None:
            raise RuntimeError("attention was called with segment lengths that were not sent from the host")
        lengths_q, lengths_k = ends_q.diff().tolist(), ends_k.diff().tolist()
        width = query.shape[-1] * query.shape[-2]
        self.add_attention(costs.attention_flop(width, lengths_q, lengths_k, bool(is_causal)), is_backward, version)

    def add_attention(self, forward_flop: int, is_backward: bool, version: FlashVersion = "fa2") -> None:
        """Count one attention kernel by the FLOPs of its forward."""
        flop = forward_flop * 5 // 2 if is_backward else forward_flop
        seconds = self.meter.rates.attention_seconds(flop, is_backward, version)
        self.meter.note(costs.attention_name(is_backward), launches=0, flop=flop, seconds=seconds)

    def _launched(self, name: str, arguments: tuple[Any, ...]) -> None:
        """A Triton kernel: its traffic is that of its tensors, once each, and twice where one is overwritten."""
        overwritten = [arguments[place] for place in costs.OVERWRITTEN.get(name, ())]
        num_bytes = costs.moved_bytes(arguments, overwritten)
        seconds = self.meter.rates.kernel_seconds(0, num_bytes)
        done = costs.num_operations(arguments, ())
        self.meter.note(name, flop=done, num_bytes=num_bytes, seconds=seconds)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _only_decomposes(func: Any) -> bool:
    """Whether it is defined by other operations alone: these are then counted one by one."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    is_composite = func._can_decompose() and has(func.name(), "CompositeImplicitAutograd")
    return is_composite and not has(func.name(), "CPU") and not has(func.name(), "CUDA")


def _largest_bytes(values: Any) -> int:
    return max((x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor)), default=0)


def _ranks(values: Any) -> list[int]:
    """Of the process group among a collective's arguments: boxed, or by its name."""
    for x in tree_leaves(values):
        if isinstance(x, torch.ScriptObject) and x._type().qualified_name().endswith(".ProcessGroup"):
            return dist.get_process_group_ranks(dist.ProcessGroup.unbox(x))
        if isinstance(x, str) and x not in ("sum", "avg", "max", "min"):
            return dist.get_process_group_ranks(_c10d._resolve_process_group(x))
    raise RuntimeError("a collective without a process group")


def _site() -> str:
    """The innermost line of the product or of transformers."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        for package in ("vcr1_fast", "vcr1_kernels", "transformers"):
            if f"/{package}/" in file and "/fake_gpu/" not in file:
                return f"{package}/{file.split(f'/{package}/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


def _patch_torch(gpu: FakeGpu) -> None:
    """Places where torch would ask a real GPU, or where bytes change without an operation."""
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # pyright: ignore[reportAttributeAccessIssue]
    fake_tensor.init_gpu_context = lambda device: None  # pyright: ignore[reportAttributeAccessIssue]
    resize = torch.UntypedStorage.resize_

    def resize_(self: torch.UntypedStorage, size: int) -> Any:
        result = resize(self, size)
        gpu.meter.memory.resized(self)
        return result

    torch.UntypedStorage.resize_ = resize_

    def pin_memory(self: Tensor, device: Any = None) -> Tensor:  # also in threads, where no mode is active
        gpu.pin(self)
        return self

    torch.Tensor.pin_memory = pin_memory  # pyright: ignore[reportAttributeAccessIssue]
    _patch_dense_attention()
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """`torch.tensor` copies to a GPU below the mode; so it is a copy here, with a wait, as it is there."""
        return (
            make(data, device="cpu", **options).to(device) if _is_cuda(device) else make(data, device=device, **options)
        )

    torch.tensor = tensor
    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate_uncounted(*args: Any, **kwargs: Any) -> Any:
        gpu.is_planning = True
        try:
            return propagate(*args, **kwargs)
        finally:
            gpu.is_planning = False

    ShardingPropagator._propagate_tensor_meta_non_cached = propagate_uncounted
    # Without a CUDA kernel these two are taken apart into elementary operations, which a GPU does in one launch each.
    for name in ("silu_backward", "gelu_backward"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
            gpu.library.impl(name, _never_called, "CUDA")


def _patch_dense_attention() -> None:
    """Dense attention as the fused operators that CUDA takes; a build without them would write out the scores."""
    functional, stock = torch.nn.functional, torch.nn.functional.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type != "cuda" or attn_mask is not None:
            return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if query.dtype in (torch.float16, torch.bfloat16):
            fused = torch.ops.aten._scaled_dot_product_flash_attention
            return fused(query, key, value, dropout_p, is_causal, scale=scale)[0]
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (key, value))
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, None, query.requires_grad, dropout_p, is_causal, scale=scale)[0]

    functional.scaled_dot_product_attention = attend  # pyright: ignore[reportAttributeAccessIssue]


def _never_called(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a kernel was called on a fake GPU")
