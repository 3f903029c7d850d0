"""The student's optimizers: their updates, their state by name at every ZeRO stage, and what is refused."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm.optim  # noqa: F401  imported once here, inherited by forked ranks
import torch
import toy
from faultplan import Fault, FaultPlan, kill
from harness import run_ranks
from small_student import SmallRun, run_file, small_student
from torch import Tensor, nn

from megacid.config.deepspeed import lint_deepspeed
from megacid.config.load import load_run
from megacid.config.optimizers import OPTIMIZERS
from megacid.distributed.optimizers import check_host, make_optimizer
from megacid.errors import UserError
from megacid.training.components import check_student
from megacid.training.memory import student_sizes
from megacid.training.schedule import hidden_matrices, parameter_groups

TABLE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


# ---- accepted or refused, as documented ----------------------------------------------------------------------------


def documented() -> dict[str, list[str]]:
    """Optimizer -> its cells in the table of docs/configuration.md: ZeRO stages 0 to 3, offload to cpu."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (yes|no) \| (yes|no) \| (yes|no) \| (yes|no) \| (yes|no) \|", TABLE.read_text(), re.M)  # fmt: skip  # noqa: E501
    return {name: cells for name, *cells in rows}


def accepted(kind: str, zero: dict[str, Any]) -> bool:
    optimizer = {"type": kind, "params": {"lr": 1e-3, "weight_decay": 0.1}}
    config = {"train_batch_size": 8, "gradient_clipping": 1.0, "optimizer": optimizer, "zero_optimization": zero}
    try:
        lint_deepspeed(config, 2)
    except UserError as error:
        assert f'"{kind}"' in str(error) and "AdamW" in str(error) and "\n" not in str(error), error
        return False
    return True


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_is_accepted_exactly_where_the_documentation_says(kind: str) -> None:
    cells = ["yes" if accepted(kind, {"stage": stage}) else "no" for stage in range(4)]
    offload = [
        accepted(kind, {"stage": s, "offload_optimizer": {"device": "cpu"}}) for s in OPTIMIZERS[kind].stages if s
    ]
    assert len(set(offload)) <= 1
    assert [*cells, "yes" if any(offload) else "no"] == documented()[kind]
    assert documented().keys() == OPTIMIZERS.keys()


def test_a_refusal_names_value_reason_and_remedy() -> None:
    with pytest.raises(UserError) as error:
        lint_deepspeed({"train_batch_size": 8, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1},
                        "optimizer": {"type": "Muon", "params": {"lr": 1e-3}}}, 1)  # fmt: skip
    assert str(error.value) == (
        '"optimizer.type" is "Muon" at "zero_optimization.stage" 1, expected stage 0, since it orthogonalizes the '
        "updates of whole matrices, but ZeRO gives an optimizer flat parts of them: lower the stage, or use AdamW"
    )


@pytest.mark.parametrize("kind", ["Lamb", "apex_fused_lamb"])
def test_lamb_without_decay_which_would_be_adam_is_refused(kind: str) -> None:
    config = {"train_batch_size": 8, "gradient_clipping": 1.0}
    for params in ({"lr": 1e-3}, {"lr": 1e-3, "weight_decay": 0.0}):
        with pytest.raises(UserError, match=rf'weight_decay" is 0.0 with "optimizer.type" "{kind}", expected > 0'):
            lint_deepspeed({**config, "optimizer": {"type": kind, "params": params}}, 1)
    if kind == "apex_fused_lamb":
        lint_deepspeed({**config, "optimizer": {"type": kind, "params": {"lr": 1e-3, "use_nvlamb": True}}}, 1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("Muon", "but PyTorch .* has none: install torch >= 2.9"), ("apex_fused_adam", "NVIDIA Apex .* not installed"),
     ("apex_fused_lamb", "NVIDIA Apex .* not installed")],
)  # fmt: skip
def test_an_optimizer_that_the_host_lacks_is_one_error_before_data(
    tmp_path: Path, kind: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    assert importlib.util.find_spec("amp_C") is None
    optimizer = {"type": kind, "params": {"lr": 1e-3}}
    with pytest.raises(UserError, match=message):
        check_host(optimizer, "cuda")
    if kind == "Muon":  # the data are missing, too
        file = toy.run_file(tmp_path, "lacking", optimizer=optimizer, zero_optimization={"stage": 0})
        assert toy.train_toy(2, file) == [2, 2]
        said = capfd.readouterr().err
        assert re.search(message, said) and said.count("error: ") == 1 and "features" not in said


# ---- an update against its formula -----------------------------------------------------------------------------------


def adam(state: dict[str, Tensor], g: Tensor, step: int, eps: float) -> Tensor:
    state["m"] = 0.9 * state.get("m", torch.zeros_like(g)) + 0.1 * g
    state["v"] = 0.95 * state.get("v", torch.zeros_like(g)) + 0.05 * g * g
    return (state["m"] / (1 - 0.9**step)) / ((state["v"] / (1 - 0.95**step)).sqrt() + eps)


def adamw(p: Tensor, g: Tensor, state: dict[str, Tensor], step: int, lr: float, decay: float) -> Tensor:
    return (1 - lr * decay) * p - lr * adam(state, g, step, 1e-8)


def lion(p: Tensor, g: Tensor, state: dict[str, Tensor], step: int, lr: float, decay: float) -> Tensor:
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2."""
    mean = state.get("m", torch.zeros_like(g))
    state["m"] = 0.95 * mean + 0.05 * g
    return (1 - lr * decay) * p - lr * (0.9 * mean + 0.1 * g).sign()


def lamb(p: Tensor, g: Tensor, state: dict[str, Tensor], step: int, lr: float, decay: float) -> Tensor:
    """You et al. 2019, arXiv 1904.00962, algorithm 2. Parameters without decay have trust ratio 1."""
    update = adam(state, g, step, 1e-6) + decay * p
    return p - lr * update * (p.norm() / update.norm() if decay else 1.0)


def muon(p: Tensor, g: Tensor, state: dict[str, Tensor], step: int, lr: float, decay: float) -> Tensor:
    """Five Newton-Schulz iterations, in the scale of Liu et al. 2025, arXiv 2502.16982."""
    state["m"] = 0.95 * state.get("m", torch.zeros_like(g)) + 0.05 * g
    x = 0.05 * g + 0.95 * state["m"]
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (1 - lr * decay) * p - lr * 0.2 * max(p.shape) ** 0.5 * x


Update = Callable[[Tensor, Tensor, dict[str, Tensor], int, float, float], Tensor]
FORMULAS: dict[str, Update] = {"AdamW": adamw, "Lion": lion, "Lamb": lamb, "Muon": adamw}


@pytest.mark.parametrize("kind", FORMULAS)
def test_updates_are_those_of_the_formula_in_fp64(kind: str) -> None:
    """With gradients of norm 100, since the trainer clips and nothing else does."""
    module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(24, 16)]), "head": nn.Linear(16, 8)})
    groups = parameter_groups(module, 0.1, muon=kind == "Muon")
    config = {"optimizer": {"type": kind, "params": {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1}}}
    optimizer = make_optimizer(config, groups) or torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    want = {name: p.detach().double() for name, p in module.named_parameters()}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in want}
    for step in (1, 2, 3):
        for seed, (name, p) in enumerate(module.named_parameters()):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + seed))
            p.grad = 100 * g / g.norm()
            formula = muon if kind == "Muon" and name == "blocks.0.weight" else FORMULAS[kind]
            before, decay = want[name], 0.1 if p.ndim == 2 else 0.0
            want[name] = formula(before, p.grad.double(), states[name], step, 1e-2, decay)
        start = {name: p.detach().clone() for name, p in module.named_parameters()}
        optimizer.step()
        for name, p in module.named_parameters():
            # Newton-Schulz is in bf16.
            rel = 0.03 if kind == "Muon" and name == "blocks.0.weight" else 1e-5
            assert (p.detach() - want[name]).norm() <= rel * (want[name] - start[name]).norm() + 1e-7, (step, name)
            want[name] = p.detach().double()


def test_muon_gets_the_matrices_of_the_blocks_and_composes_with_layer_decay() -> None:
    student = small_student()
    hidden = hidden_matrices(student)
    block = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    towers = ("clip.visual.transformer", "clip.transformer")
    assert hidden == {f"{tower}.resblocks.{i}.{name}" for tower in towers for i in (0, 1) for name in block}
    groups = parameter_groups(student, 0.1, 0.5, muon=True)
    names = {p: name for name, p in student.named_parameters()}
    assert {names[p] for group in groups if group["muon"] for p in group["params"]} == hidden
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {group["lr_scale"] for group in groups if group["muon"]} == {0.5, 0.25}
    assert all(group["weight_decay"] == 0.1 for group in groups if group["muon"])


def test_muon_without_a_matrix_in_a_block_is_refused() -> None:
    groups = parameter_groups(nn.Linear(3, 4), 0.1, muon=True)
    config = {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}}
    with pytest.raises(UserError, match='is "Muon", but no block of a tower has a matrix that is trained'):
        make_optimizer(config, groups)


def test_muon_for_a_student_with_frozen_blocks_is_refused_before_data(tmp_path: Path) -> None:
    settings = ["zero_optimization.stage=0", "loss.instance=0", "loss.mse=0", "loss.beta=0", "loss.gamma=0",
                "data.teacher=null", 'student.freeze=["*resblocks*"]']  # fmt: skip
    file = run_file(tmp_path)
    check_student(load_run(file, [*settings, "optimizer.type=AdamW"], world=1))
    with pytest.raises(UserError, match='is "Muon", but no block of a tower has a matrix that is trained'):
        check_student(load_run(file, [*settings, "optimizer.type=Muon"], world=1))
    check_student(load_run(file, [*settings[:-1], "optimizer.type=Muon"], world=1))


def test_the_estimated_memory_of_the_optimizer_follows_its_moments(tmp_path: Path) -> None:
    file, sizes = run_file(tmp_path), {}
    for kind, stage in (("AdamW", 0), ("Lion", 0), ("Lion", 1), ("Muon", 0)):
        settings = [f"optimizer.type={kind}", f"zero_optimization.stage={stage}"]
        found = student_sizes(load_run(file, settings, world=1), 1000, 1, "cuda", muon=600 if kind == "Muon" else 0)
        sizes[kind, stage] = found["student optimizer"]
    assert list(sizes.values()) == [8000, 4000, 8000, 8000 - 2400]


# ---- state by name ---------------------------------------------------------------------------------------------------


def settings_of(kind: str, stage: int, offload: bool) -> list[str]:
    world = torch.distributed.get_world_size()
    found = [f"optimizer.type={kind}", f"zero_optimization.stage={stage}", f"train_batch_size={world}"]
    return [*found, "zero_optimization.offload_optimizer.device=cpu"] if offload else found


def saved_and_loaded(
    file: Path, kind: str, cases: list[tuple[int, bool]], given: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], list[float]]:
    """At each (ZeRO stage, offload): load, skip, save, go on, and go on from what was saved, with the same bits.

    given: the state after two updates; None: it is made at the first stage. Returns it, and the norms of a gradient.
    """
    norms = []
    for stage, offload in cases:
        run, resumed = (SmallRun(file, settings_of(kind, stage, offload)) for _ in range(2))
        if given is None:
            run.step()
            run.step()
        else:
            run.load(given, 2)
        loaded = run.state()
        if given is not None:
            assert toy.differing(given, loaded) == [], (stage, offload)
        given = loaded
        norms.append(run.backward()[1])
        run.engine.skip()
        assert toy.differing(given, run.state()) == [], (stage, offload)
        resumed.load(given, 2)
        run.step()
        resumed.step()
        assert toy.differing(run.state(), resumed.state()) == [], (stage, offload)
        assert "param/clip.visual.proj" in toy.differing(given, run.state())
    assert given is not None
    return given, norms


def every(kind: str) -> list[tuple[int, bool]]:
    """Each ZeRO stage of an optimizer, with and without offload."""
    offloads = [False, True] if "cpu" in OPTIMIZERS[kind].offload else [False]
    return [(stage, offload) for stage in OPTIMIZERS[kind].stages for offload in offloads if stage or not offload]


SOME = [
    ("Lion", 2, [(1, False)], 1, [(3, True)]),
    ("Lamb", 2, [(0, False)], 1, [(0, False)]),
]
ALL = [(kind, 2, every(kind), after, every(kind)) for kind in ("AdamW", "Lion", "Lamb", "Muon") for after in (1, 3)]


@pytest.mark.parametrize(
    ("kind", "before", "cases", "after", "later"), [*SOME, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL)]
)
def test_state_passes_between_stages_ranks_and_offload_and_a_skip_leaves_it(
    tmp_path: Path, kind: str, before: int, cases: list[tuple[int, bool]], after: int, later: list[tuple[int, bool]]
) -> None:
    file = run_file(tmp_path)
    results = run_ranks(saved_and_loaded, before, file, kind, cases, None, timeout_s=200)
    given, norms = results[0]
    assert {name.split("/")[0] for name in given} >= {"param", *OPTIMIZERS[kind].moments}
    assert ("momentum_buffer/clip.transformer.resblocks.0.mlp.c_fc.weight" in given) is (kind == "Muon")
    for other, _ in results[1:]:
        assert toy.differing(given, other) == []
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)
    norms = run_ranks(saved_and_loaded, after, file, kind, later, given, timeout_s=200)[0][1]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


RUNS = [("Muon", 0)]
MORE = [("Lion", 0), ("Lion", 1), ("Lion", 2), ("Lion", 3), ("Lamb", 0)]


@pytest.mark.parametrize(("kind", "stage"), [*RUNS, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE)])
def test_a_killed_run_goes_on_with_the_same_bits_over_a_skipped_step(tmp_path: Path, kind: str, stage: int) -> None:
    toy.write_features(tmp_path / "features")
    changes: dict[str, Any] = {
        "optimizer": {"type": kind, "params": {"lr": 3e-3, "weight_decay": 0.1}}, "run__save_every": 2,
        "zero_optimization": {"stage": stage}, "run__total_steps": 6, "guard__max_skipped_share": 1.0,
    }  # fmt: skip
    whole, parts = (toy.run_file(tmp_path, name, **changes) for name in ("whole", "parts"))
    bad = Fault("train:batch", "nan_batch", step=3)
    assert toy.train_toy(2, whole, plan=FaultPlan(bad)) == [0, 0]
    assert -9 in toy.train_toy(2, parts, plan=FaultPlan(bad, kill("train:gradients", rank=1, step=4)))
    assert toy.train_toy(2, parts, plan=FaultPlan(bad)) == [0, 0]
    ends = [toy.tensors(tmp_path / "runs" / name / "step-00000006") for name in ("whole", "parts")]
    assert toy.differing(*ends) == []
