"""The kernels of a run prove themselves on its GPU before they are used: each is compared with its plain path.

On small problems of the run's own shapes (`kernel_problems`) the plain path runs twice, in the run's element type and
in float64. Of every output, a kernel may be off from float64 by at most

    4 x (distance of the plain path in the run's type)  +  64 eps(float32)  +  eps(type) / 2,  and by 0.1 at most

The factor leaves room for another order of summation and for one more rounding of an intermediate value than the plain
path has; the floor is one rounding of the result and some dozens of float32 operations, for where the plain path is
exact by luck. Where the plain path is far off itself it proves nothing, hence the last bound. A distance is that of the
worst row (a token, a head's vector, a row of a weight), relative to the row's norm or, for smaller rows, to that of the
median row: one wrong row is seen among thousands of right ones.

A way that raises or is further off is not taken, on any rank, and the next one is tried: another kernel where there is
one, in the end the plain path. Kernels stand or fall one by one. What held is remembered (`kernel_memory`).
Rewards on the GPU, which must equal the CPU's bit for bit, are compared by `native_cuda.choose_half`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vcr1_kernels.prefix_attention import attention_backend

from vcr1_fast.learner import kernel_problems, operator_problems
from vcr1_fast.learner.kernel_choice import KernelChoice, Pick, cpu_choice, plain_choice
from vcr1_fast.learner.kernel_memory import Memory, Verdict, machine_key
from vcr1_fast.learner.kernel_problems import Outputs, Problem, Shapes, ways_of
from vcr1_fast.learner.loading import read_config
from vcr1_fast.learner.model import resolve_dtype
from vcr1_fast.learner.objective import negative_log_likelihood, policy_loss
from vcr1_fast.learner.public_sizes import PUBLIC_SIZES
from vcr1_fast.learner.sharding import SINGLE_PROCESS, World, all_max_int
from vcr1_fast.run.model_folder import model_folder
from vcr1_fast.run.random_state import rng_state, set_rng_state
from vcr1_fast.settings.config import AlgorithmConfig, Config, ConfigError, ModelConfig

MULTIPLE = 4.0
MOST_ALLOWED = 0.1
PLAIN_WAYS = {kernel: pick.way for kernel, pick in plain_choice().picks()}
RUN_KERNELS = tuple(PLAIN_WAYS)
_OUTCOMES = ("held", "failed", "crashed")  # the worst of all ranks counts


@dataclass(frozen=True)
class Subject:
    """What the kernels are compared on."""

    shapes: Shapes
    algorithm: AlgorithmConfig

    @classmethod
    def of_run(cls, config: Config, dtype: torch.dtype) -> Subject:
        checkpoint = read_config(model_folder(config.model.path))
        shapes = Shapes.of_model(
            checkpoint.get_text_config(),
            checkpoint.vision_config,
            dtype,
            trains_head=config.model.lora.rank == 0,
            trains_tower=not config.model.is_tower_frozen,
            temperature=config.rollout.temperature,
            model_type=checkpoint.model_type,
        )
        return cls(shapes, config.algorithm)

    @classmethod
    def of_public_model(cls, name: str, device: torch.device) -> Subject:
        """A public checkpoint with default settings, for where there is no run."""
        text = PUBLIC_SIZES[name]
        names = (SimpleNamespace(**text), SimpleNamespace(**text["vision_config"]))
        return cls(Shapes.of_model(*names, resolve_dtype(ModelConfig(), device)), AlgorithmConfig())

    def problem(self, kernel: str, device: torch.device) -> Problem:
        if kernel == "policy_loss":
            losses = {self.algorithm.loss: policy_loss(self.algorithm), "sft": negative_log_likelihood}
            return kernel_problems.policy_loss_problem(self.shapes, device, losses)
        module = operator_problems if kernel in operator_problems.KERNELS else kernel_problems
        return getattr(module, f"{kernel}_problem")(self.shapes, device)

    def key(self) -> dict[str, str]:
        loss = policy_loss(self.algorithm)
        options = {f.name: getattr(loss, f.name) for f in fields(loss) if f.name != "largest_gap"}
        return {"shapes": repr(self.shapes), "loss": repr(options)}


@dataclass(frozen=True)
class Proof:
    """The choice that follows, and what it follows from."""

    choice: KernelChoice
    verdicts: tuple[Verdict, ...] = ()  # this rank's, of every way that was tried or remembered
    check_s: float = 0.0
    compile_s: float = 0.0

    def lines(self) -> list[str]:
        """One for each comparison, with its numbers."""
        return [
            f"kernel {v.kernel} ({v.way}) {v.outcome}: {v.output + ' ' + v.numbers() if v.output else v.reason}"
            for v in self.verdicts
        ]


def choose_kernels(config: Config, world: World) -> Proof:
    """What `model.kernels` means on this run's device. A collective on CUDA: all ranks choose alike.

    off: plain paths. CPU: torch code, there is nothing to compare. CUDA: what holds.
    Raises ConfigError when `model.kernels` is `required` and a kernel does not hold, or when one took the GPU's context
    with it; it is left out when the run is started again.
    """
    dtype = resolve_dtype(config.model, world.device)
    if config.model.kernels == "off":
        return Proof(plain_choice("model.kernels is off"))
    if world.device.type != "cuda":
        return Proof(cpu_choice(dtype))
    proof = prove(Subject.of_run(config, dtype), world)
    broken = [f"{name}: {pick.reason}" for name, pick in proof.choice.picks() if pick.is_fallback]
    if broken and config.model.kernels == "required":
        raise ConfigError(
            f"model.kernels is required, but not every kernel can be used here: {'; '.join(broken)}; "
            "set it to auto to run those on a slower path"
        )
    return proof


def prove(
    subject: Subject, world: World = SINGLE_PROCESS, kernels: Sequence[str] = RUN_KERNELS, fresh: bool = False
) -> Proof:
    """Compares `kernels` on `world.device`, in step on all ranks. `fresh`: what is remembered does not count.

    The state of every random generator is left as it was.
    """
    memory = Memory(machine_key(world.device) | subject.key())
    remembered = memory.recall()
    known = {at: v for at, v in remembered.items() if not fresh or v.outcome == "crashed"}
    trial = _Trial(subject, world, known)
    random_state = rng_state()
    try:
        picks = {kernel: trial.pick(kernel) for kernel in kernels}
    finally:
        if trial.new:
            memory.keep((remembered | trial.new).values())
    set_rng_state(random_state)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # an engine may share the GPU
    chosen: dict[str, Any] = picks
    clause = "kernels compared with their plain paths "
    if trial.new:
        clause += f"in {trial.check_s:.1f} s, after {trial.compile_s:.1f} s of compilation"
    else:
        clause += "on an earlier start"
    return Proof(KernelChoice(**chosen, proof=clause), tuple(trial.verdicts), trial.check_s, trial.compile_s)


class _Trial:
    """One after the other, the ways of each kernel, until one holds on all ranks."""

    def __init__(self, subject: Subject, world: World, known: Mapping[tuple[str, str], Verdict]) -> None:
        self.subject, self.world, self.known = subject, world, known
        self.verdicts: list[Verdict] = []
        self.new: dict[tuple[str, str], Verdict] = {}
        self.check_s = self.compile_s = 0.0

    def pick(self, kernel: str) -> Pick:
        """The first way that holds. Raises ConfigError when the GPU of a rank no longer answers."""
        reasons: list[str] = []
        examination = _Examination(kernel, self.subject, self.world.device)
        for way in ways_of(kernel, self.subject.shapes.dtype):
            verdict = self._verdict(examination, way)
            outcome = _OUTCOMES[all_max_int(_OUTCOMES.index(verdict.outcome), self.world)]
            if outcome == "held":
                return Pick(way, "; ".join(reasons) or self._why(kernel, way), is_fallback=bool(reasons))
            is_own = outcome == verdict.outcome
            reason = f"{way} {verdict.reason if is_own else f'{outcome} on another rank, whose own message says why'}"
            if is_own and not self.world.is_main:
                print(f"kernel {kernel}: {reason}", file=sys.stderr, flush=True)
            if outcome == "crashed":
                raise ConfigError(
                    f"the kernel {kernel} took the GPU's context with it: {reason}; start the run again, it will then "
                    "take another path"
                )
            reasons.append(reason)
        return Pick(PLAIN_WAYS[kernel], "; ".join(reasons), is_fallback=bool(reasons))

    def _verdict(self, examination: _Examination, way: str) -> Verdict:
        verdict = self.known.get((examination.kernel, way))
        if verdict is None:
            started_s, compiled_s = time.perf_counter(), examination.compile_s
            verdict = examination.verdict(way)
            compile_s = examination.compile_s - compiled_s
            self.compile_s += compile_s
            self.check_s += time.perf_counter() - started_s - compile_s
            self.new[verdict.kernel, verdict.way] = verdict
        elif verdict.outcome == "crashed":  # not here and now: the others need not stop
            reason = f"took the GPU's context with it on an earlier start: {verdict.reason}"
            verdict = replace(verdict, outcome="failed", reason=reason)
        self.verdicts.append(verdict)
        return verdict

    def _why(self, kernel: str, way: str) -> str:
        if kernel != "attention" or way != "flash":
            return ""
        return attention_backend(self.world.device, self.subject.shapes.dtype, self.subject.shapes.head_dim).reason


class _Examination:
    """The comparisons of one kernel; the plain path and float64 are computed once, when they are first needed."""

    def __init__(self, kernel: str, subject: Subject, device: torch.device) -> None:
        self.kernel, self.subject, self.device = kernel, subject, device
        self.compile_s = 0.0
        self._expected: tuple[Problem, Outputs, dict[str, float]] | None = None

    def verdict(self, way: str) -> Verdict:
        """Never raises an Exception: what does not work is what this is about."""
        try:
            problem, exact, plain = self._expect()
            got = self._run(lambda: problem.run(way))
            off = {name: distance(got[name], exact[name]) for name in exact}
        except Exception as error:
            reason = f"raised {type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"
            return Verdict(self.kernel, way, "failed" if self._answers() else "crashed", reason)
        allowed = {name: min(MULTIPLE * plain[name] + self._floor(), MOST_ALLOWED) for name in exact}
        beyond = [name for name in exact if not off[name] <= allowed[name]]  # a NaN on either side is beyond
        worst = beyond[0] if beyond else max(exact, key=lambda name: off[name] / allowed[name])
        numbers = {"output": worst, "distance": off[worst], "plain_distance": plain[worst], "allowed": allowed[worst]}
        if not beyond:
            return Verdict(self.kernel, way, "held", **numbers)
        found = Verdict(self.kernel, way, "failed", **numbers)
        return replace(found, reason=f"disagrees with the plain path: {worst} {found.numbers()}")

    def _expect(self) -> tuple[Problem, Outputs, dict[str, float]]:
        if self._expected is None:
            problem = self.subject.problem(self.kernel, self.device)
            exact, plain = problem.exact(), problem.plain()
            self._expected = problem, exact, {name: distance(plain[name], exact[name]) for name in exact}
        return self._expected

    def _run(self, function: Callable[[], Outputs]) -> Outputs:
        """The outputs; on CUDA of a second call, after the first has compiled, whose seconds count apart."""
        if self.device.type != "cuda":
            return function()
        started_s = time.perf_counter()
        try:
            function()
            torch.cuda.synchronize(self.device)
        finally:
            self.compile_s += time.perf_counter() - started_s
        return function()

    def _floor(self) -> float:
        return 64 * torch.finfo(torch.float32).eps + torch.finfo(self.subject.shapes.dtype).eps / 2

    def _answers(self) -> bool:
        """Whether the device still computes: an illegal access leaves a context in which every call fails."""
        try:
            return float(torch.ones(1, device=self.device).sum()) == 1.0
        except Exception:
            return False


def distance(got: Tensor, exact: Tensor) -> float:
    """The worst row's error relative to its norm, or to the median row's where that is larger. Rows: last dimension.

    The numbers of a vector are rows of one. NaN when `got` has any. Raises ValueError for another shape.
    """
    if got.shape != exact.shape:
        raise ValueError(f"gave the shape {tuple(got.shape)}, wanted {tuple(exact.shape)}")
    width = exact.shape[-1] if exact.ndim > 1 else 1
    got, exact = (x.detach().double().reshape(-1, width) for x in (got, exact))
    error_R, size_R = (got - exact).norm(dim=1), exact.norm(dim=1)
    relative_R = error_R / torch.maximum(size_R, size_R.median())
    return float(torch.where(error_R == 0, 0.0, relative_R).max())
