"""Which flash attention is taken: packages with the real releases' arguments, computed by the dense stand-ins."""

import sys
import types

import pytest
import torch
from vcr1_kernels import flash_routes
from vcr1_kernels.flash_routes import PACKAGES, PackageOps, flash_ops
from vcr1_kernels.prefix_attention_flash import FlashAttention
from vcr1_kernels.varlen_attention import varlen_attention

from tests.kernels.attention_rows import LAYOUTS
from tests.kernels.test_prefix_attention_flash import assert_equals_one_softmax, dense_backward, dense_forward
from vcr1_fast.fake_gpu.flash_packages import SIGNATURES, StandIn, signature

PACKAGE_OF = {"fa2": PACKAGES[2], "fa3": PACKAGES[0], "fa3 of 2.8.3": PACKAGES[0], "fa4": PACKAGES[1]}
HOPPER = torch.device("cpu")  # computes the stand-ins; what is asked of it is patched


def dense(is_backward, arguments):
    """A call by the names of any of the packages, which must not switch on anything besides."""
    tables = [arguments[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    causal, scale = arguments.get("causal", arguments.get("is_causal")), arguments["softmax_scale"]
    assert arguments.get("dropout_p", 0.0) == arguments.get("softcap", 0.0) == 0.0
    assert {arguments.get("window_size_left", -1), arguments.get("window_size_right", -1)} == {-1}
    q, k, v = (arguments[name] for name in "qkv")
    if not is_backward:
        return dense_forward(q, k, v, *tables, 0.0, causal, False, scale=scale)[:2] + (None,) * 3
    assert arguments["deterministic"] is False
    lse = arguments.get("softmax_lse", arguments.get("lse"))
    state = (torch.zeros(2, dtype=torch.uint64), torch.empty(0))
    tensors = (arguments["dout"], q, k, v, arguments["out"], lse)
    for name, grad in zip(
        ("dq", "dk", "dv"), dense_backward(*tensors, *tables, 0.0, causal, *state, scale=scale), strict=True
    ):
        arguments[name].copy_(grad)


def put(monkeypatch, version, forward=None, backward=None):
    """The package of this version, and none of the others."""
    take_all_away(monkeypatch)
    package, (forward_of, backward_of) = PACKAGE_OF[version], SIGNATURES[version]
    module = types.ModuleType(package.module)
    setattr(module, package.forward, StandIn(forward or forward_of, lambda arguments: dense(False, arguments)))
    setattr(module, package.backward, StandIn(backward or backward_of, lambda arguments: dense(True, arguments)))
    monkeypatch.setitem(sys.modules, package.module, module)


def take_all_away(monkeypatch):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package.module, None)


@pytest.fixture(autouse=True)
def pretend_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    flash_ops.cache_clear()
    yield
    flash_ops.cache_clear()


@pytest.mark.parametrize("version", SIGNATURES)
def test_a_package_is_called_with_its_own_argument_names(monkeypatch, version):
    put(monkeypatch, version)
    ops, _ = flash_ops(HOPPER)
    assert isinstance(ops, PackageOps) and ops.name == PACKAGE_OF[version].name
    assert_equals_one_softmax(FlashAttention(ops), LAYOUTS["two_groups"], 4, 2)


@pytest.mark.parametrize("version", SIGNATURES)
def test_what_is_passed_without_effect_are_arguments_without_a_default(version):
    """Anything else that a package has keeps the value that its authors gave it."""
    package = PACKAGE_OF[version]
    functions = [StandIn(text, dict) for text in SIGNATURES[version]]
    namespace = types.SimpleNamespace(**dict(zip((package.forward, package.backward), functions, strict=True)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_routes.importlib, "import_module", lambda name: namespace)
        ops = package.ops()
    for bound, text in zip((ops.forward_function, ops.backward_function), SIGNATURES[version], strict=True):
        defaults = {p.name for p in signature(text).parameters.values() if p.default is not p.empty}
        assert defaults & set(bound.constants) == ({"return_lse"} if "return_lse" in defaults else set())


def test_the_order_on_hopper_and_elsewhere(monkeypatch):
    for version in ("fa2", "fa4", "fa3"):
        package = PACKAGE_OF[version]
        functions = dict(zip((package.forward, package.backward), SIGNATURES[version], strict=True))
        module = types.SimpleNamespace(**{name: StandIn(text, dict) for name, text in functions.items()})
        monkeypatch.setitem(sys.modules, package.module, module)
    found, reason = flash_ops(HOPPER)
    assert (found.name, reason) == ("flash-attn 3", "the first choice")
    monkeypatch.setitem(sys.modules, PACKAGES[0].module, None)
    flash_ops.cache_clear()
    found, reason = flash_ops(HOPPER)
    assert (found.name, reason) == ("flash-attn 4", "flash-attn 3 is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    flash_ops.cache_clear()
    assert flash_ops(HOPPER)[0].name == "flash-attn 2"


@pytest.mark.parametrize(
    ("version", "changed", "reason"),
    [
        ("fa4", {"forward": "q k v causal"}, "got an unexpected keyword argument 'cu_seqlens_q'"),
        ("fa3", {"backward": f"{SIGNATURES['fa3'][1]} sink"}, "missing a required argument: 'sink'"),
    ],
)
def test_a_package_with_other_arguments_is_refused_and_the_next_one_taken(monkeypatch, version, changed, reason):
    parameters = {name: " ".join(sorted(text.split(), key=lambda word: "=" in word)) for name, text in changed.items()}
    put(monkeypatch, version, **parameters)
    found, told = flash_ops(HOPPER)
    assert found.name == "torch's built-in flash attention"
    assert f"{PACKAGE_OF[version].name} has other functions than known here" in told and reason in told


def test_reasons_of_packages_that_cannot_be_imported(monkeypatch):
    take_all_away(monkeypatch)

    def fails(name):
        error = {"flash_attn_interface": OSError("libcudart.so.12: no such file")}
        raise error.get(name, ModuleNotFoundError(f"No module named {name!r}", name="cutlass"))

    monkeypatch.setattr(flash_routes.importlib, "import_module", fails)
    told = flash_ops(HOPPER)[1]
    assert "flash-attn 3 cannot be used (OSError: libcudart.so.12: no such file)" in told
    assert "flash-attn 4 wants cutlass, which is not installed" in told
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    flash_ops.cache_clear()
    assert flash_ops(HOPPER)[0] is None


def windows():
    """Queries, keys, values and a gradient of three segments."""
    lengths = [5, 1, 9]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(15, 3, 8, generator=generator, dtype=torch.float64) for _ in range(4)]
    return tensors, torch.tensor([0, 5, 6, 15], dtype=torch.int32), torch.tensor(lengths)


@pytest.mark.parametrize("version", SIGNATURES)
def test_windows_go_the_same_way(monkeypatch, version):
    """Values and gradients of one softmax per window, in float64."""
    put(monkeypatch, version)
    (*leaves, grad), ends, lengths = windows()
    leaves = [x.requires_grad_() for x in leaves]
    got = [varlen_attention(*leaves, ends, lengths, 0.3)]
    got += torch.autograd.grad(got[0], leaves, grad)
    parts = [x.transpose(0, 1).split(lengths.tolist(), dim=1) for x in leaves]
    attend = torch.nn.functional.scaled_dot_product_attention
    want = [torch.cat([attend(*part, scale=0.3) for part in zip(*parts, strict=True)], dim=1).transpose(0, 1)]
    want += torch.autograd.grad(want[0], leaves, grad)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lengths", [[5, 10], [5, 2, 9]])
def test_windows_that_do_not_make_up_the_row_are_refused(monkeypatch, lengths):
    put(monkeypatch, "fa2")
    (query, key, value, _), ends, _ = windows()
    with pytest.raises(ValueError, match="wanted one end more, and 15 in all"):
        varlen_attention(query, key, value, ends, torch.tensor(lengths), 0.3)


def test_the_operator_of_windows_is_well_registered(monkeypatch):
    put(monkeypatch, "fa4")
    (query, key, value, _), ends, lengths = windows()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.vcr1_kernels.varlen_attention_forward.default
    torch.library.opcheck(operator, (*leaves, ends, lengths, 0.3), test_utils=checks)
