"""Which parameters each optimizer moves, and how: AdamW, Muon, a slower or frozen trunk, clipped gradients."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import tiny_config
from tests.training.test_step import CPU, ORIGIN, batch
from tune_ego.config import Config, ModelConfig
from tune_ego.errors import UserError
from tune_ego.model import build_stream
from tune_ego.model.two_stream import ParameterRole
from tune_ego.results.experiment import read_metrics, write_metrics
from tune_ego.training.muon import MuonWithAdamW
from tune_ego.training.optim import StreamOptimizer, build_optimizer, check_optimizer
from tune_ego.training.trainer import Trainer


def settings(name: str, **values: Any) -> Config:
    return tiny_config(optimizer__name=name, **{f"optimizer__{key}": value for key, value in values.items()})


def roles_of(**changes: Any) -> dict[str, ParameterRole]:
    """The role of each parameter of a narrow RGB stream, by name."""
    stream = build_stream("rgb", 3, ModelConfig(width=0.05, **changes))
    names = [name for name, _ in stream.named_parameters()]
    roles = stream.parameter_roles()
    assert [role.parameter for role in roles] == list(stream.parameters())
    return dict(zip(names, roles))


def test_the_role_of_each_parameter() -> None:
    roles = roles_of(stam_depth=2)
    trunk = {name for name, role in roles.items() if role.trunk}
    assert trunk == {name for name in roles if name.split(".")[0].startswith(("Conv3d_", "Mixed_"))}
    assert {name for name, role in roles.items() if role.weight} == {
        name for name in roles if name.endswith("conv3d.weight")
    }
    outer = {"Conv3d_1a_7x7.conv3d.weight", "logits.conv3d.weight", "logits.conv3d.bias"}
    assert {name for name, role in roles.items() if not role.hidden} == outer
    attention = roles_of(stam_block="attention")
    weights = {name for name, role in attention.items() if role.weight and not role.trunk}
    linear = {f"attention_self.{name}.weight" for name in ("qkv", "attention_out", "mlp_in", "mlp_out")}
    assert weights == linear | {"attention_pred.conv3d.weight", "logits.conv3d.weight"}


def test_groups_of_learning_rate_and_weight_decay() -> None:
    named = roles_of()
    roles = list(named.values())
    one = build_optimizer(settings("sgd", weight_decay=0.1), roles).param_groups
    assert len(one) == 1 and one[0]["params"] == [role.parameter for role in roles]
    config = settings("ranger", lr=0.4, trunk_lr=0.1, weight_decay=0.3, decay_all=False)
    groups = build_optimizer(config, roles).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(groups) == 4 and len(found) == len(roles)
    for name, role in named.items():
        trunk = not name.startswith(("attention", "logits"))
        expected = (0.1 if trunk else 0.4, 0.3 if name.endswith("conv3d.weight") else 0.0)
        assert found[id(role.parameter)] == expected, name


def test_a_schedule_s_factor_applies_to_both_rates() -> None:
    config = settings("sgd", lr=0.4, trunk_lr=0.1).model_copy(
        update={"schedule": tiny_config(schedule__name="multistep", schedule__milestones=[1]).schedule}
    )
    head, trunk = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    stream = StreamOptimizer(config, [ParameterRole(trunk, trunk=True), ParameterRole(head)], CPU, scale_loss=False)
    assert stream.learning_rate == 0.4
    for _ in range(2):
        head.grad, trunk.grad = torch.ones(1), torch.ones(1)
        stream.step()
    assert stream.learning_rate == pytest.approx(0.04)
    assert [group["lr"] for group in stream.optimizer.param_groups] == pytest.approx([0.01, 0.04])
    # Momentum 0.9: the second step has 1.9 times the gradient.
    assert [head.item(), trunk.item()] == pytest.approx([1 - 0.4 - 0.04 * 1.9, 1 - 0.1 - 0.01 * 1.9], abs=1e-6)


def test_nesterov_by_hand() -> None:
    """Gradient 1, momentum 0.5: steps of 1 + 0.5 x 1 and of 1 + 0.5 x 1.5."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    config = settings("sgd", lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.0)
    optimizer = build_optimizer(config, [ParameterRole(p)])
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.item() == pytest.approx(-0.15 - 0.175)
    with pytest.raises(UserError, match=r"nesterov: Nesterov's momentum needs optimizer.momentum above 0"):
        settings("sgd", momentum=0.0, nesterov=True)


def test_adamw_by_hand() -> None:
    """Weight 2, lr 0.1, decay 0.5, gradient 3: decay leaves 2 x 0.95, the first step is lr x sign of the gradient."""
    p, norm = (nn.Parameter(torch.full((1,), 2.0, dtype=torch.float64)) for _ in range(2))
    config = settings("adamw", lr=0.1, weight_decay=0.5, eps=1e-12)
    optimizer = build_optimizer(config, [ParameterRole(p), ParameterRole(norm, weight=False)])
    for parameter in (p, norm):
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    assert p.item() == pytest.approx(1.9 - 0.1)
    assert norm.item() == pytest.approx(2.0 - 0.1)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz with the coefficients of Jordan et al., in float64: x <- a x + (b A + c A A) x, A = x x^T."""
    x = matrix.double()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def test_muon_moves_hidden_weights_and_adamw_the_rest() -> None:
    """The first step: Nesterov leaves g (1 - 0.95^2), whose scale Newton-Schulz removes; decay 0.5 is decoupled.

    Newton-Schulz computes in bfloat16, so a step is right to some 2 %.
    """
    torch.manual_seed(0)
    weight, outer = nn.Parameter(torch.randn(6, 2, 3, 1, 1)), nn.Parameter(torch.randn(4, 2, 1, 1, 1))
    bias = nn.Parameter(torch.randn(4))
    roles = [
        ParameterRole(outer, hidden=False),
        ParameterRole(bias, weight=False),
        ParameterRole(weight),
    ]
    optimizer = build_optimizer(settings("muon", lr=0.1, weight_decay=0.5), roles)
    before = [p.detach().clone() for p in (weight, outer, bias)]
    for p in (weight, outer, bias):
        p.grad = torch.randn_like(p)
    gradient = weight.grad
    assert gradient is not None
    optimizer.step()
    step = 0.1 * 0.2 * math.sqrt(6) * orthogonalized(gradient.flatten(1)).reshape(weight.shape)
    expected = before[0].double() * 0.95 - step
    assert (weight.double() - expected).abs().max() < 0.02 * step.abs().max()
    assert outer.grad is not None and bias.grad is not None
    torch.testing.assert_close(outer.detach(), before[1] * 0.95 - 0.1 * outer.grad.sign(), atol=1e-5, rtol=0)
    torch.testing.assert_close(bias.detach(), before[2] - 0.1 * bias.grad.sign(), atol=1e-5, rtol=0)


def muon_steps(p: nn.Parameter, gradients: list[torch.Tensor], reload_at: int | None = None) -> torch.Tensor:
    config = settings("muon", lr=0.1)
    optimizer = build_optimizer(config, [ParameterRole(p)])
    for number, gradient in enumerate(gradients):
        if number == reload_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = build_optimizer(config, [ParameterRole(p)])
            optimizer.load_state_dict(state)
        p.grad = gradient.clone().to(memory_format=torch.preserve_format)
        optimizer.step()
    return p.detach().contiguous()


def test_muon_resumes_and_does_not_depend_on_the_memory_format() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 3, 2, 2, 2), [torch.randn(4, 3, 2, 2, 2) for _ in range(5)]
    whole = muon_steps(nn.Parameter(start.clone()), gradients)
    assert torch.equal(muon_steps(nn.Parameter(start.clone()), gradients, reload_at=3), whole)
    last = torch.channels_last_3d
    assert torch.equal(muon_steps(nn.Parameter(start.clone(memory_format=last)), gradients, reload_at=2), whole)
    assert not torch.equal(muon_steps(nn.Parameter(start.clone()), gradients[:3] + [gradients[0]] * 2), whole)


def test_muon_starts_from_the_weights_as_they_are() -> None:
    """Weights that are loaded after the optimizer was built, as on resume."""
    p = nn.Parameter(torch.zeros(3, 3))
    optimizer = build_optimizer(settings("muon", lr=1e-3), [ParameterRole(p)])
    p.data.fill_(5.0)
    p.grad = torch.eye(3)
    optimizer.step()
    assert (p - 5.0).abs().max() < 0.01 and not torch.equal(p.detach(), torch.full((3, 3), 5.0))


def test_muon_follows_the_rates_of_its_groups_and_skips_what_has_no_gradient() -> None:
    weight, still, bias = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3)), nn.Parameter(torch.zeros(3))
    roles = [ParameterRole(weight), ParameterRole(still), ParameterRole(bias, weight=False)]
    optimizer = build_optimizer(settings("muon", lr=0.1, weight_decay=0.0), roles)
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    weight.grad, bias.grad = torch.eye(3), torch.ones(3)
    optimizer.step()
    assert torch.equal(still.detach(), torch.eye(3))
    assert bias.detach().tolist() == pytest.approx([-0.02] * 3, rel=1e-4)
    step = 1 - weight[0, 0].item()
    assert step == pytest.approx(0.02 * 0.2 * math.sqrt(3) * orthogonalized(torch.eye(3))[0, 0].item(), rel=0.02)


def test_an_old_torch_has_no_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"optimizer.name: muon needs torch 2.9 or newer; this is torch \d"):
        check_optimizer(settings("muon").optimizer)
    check_optimizer(settings("adamw").optimizer)


def test_the_state_of_other_optimizers_is_refused() -> None:
    both = build_optimizer(
        settings("muon"),
        [ParameterRole(nn.Parameter(torch.eye(2))), ParameterRole(nn.Parameter(torch.ones(2)), weight=False)],
    )
    alone = build_optimizer(settings("muon"), [ParameterRole(nn.Parameter(torch.eye(2)))])
    assert isinstance(alone, MuonWithAdamW)
    with pytest.raises(ValueError, match="a state of 2 optimizers, not 1"):
        alone.load_state_dict(both.state_dict())


def step_once(**changes: Any) -> tuple[dict[str, torch.Tensor], Trainer]:
    """The change of each value in the state of the RGB stream after one step, and the trainer."""
    trainer = Trainer(tiny_config(streams="rgb", train__precision="off", **changes), ORIGIN, CPU)
    before = {name: value.clone() for name, value in trainer.model["rgb"].state_dict().items()}
    trainer.step(iter([batch(0, clips=4)]))
    return {name: value - before[name] for name, value in trainer.model["rgb"].state_dict().items()}, trainer


def test_a_frozen_trunk_stays_and_later_moves() -> None:
    moved, trainer = step_once(train__freeze_trunk_for=1, optimizer__name="sgd", optimizer__weight_decay=0.1)
    parameters = [name for name, _ in trainer.model["rgb"].named_parameters()]
    still = {name for name in parameters if not moved[name].any()}
    assert still and all(name.startswith(("Conv3d_", "Mixed_")) for name in still)
    assert {name for name in parameters if name.startswith(("Conv3d_", "Mixed_"))} == still
    assert moved["logits.conv3d.weight"].any() and moved["Mixed_5c.b0.bn.running_mean"].any()
    before = trainer.model.get_parameter("rgb.Mixed_5c.b0.conv3d.weight").detach().clone()
    trainer.step(iter([batch(1, clips=4)]))
    assert not torch.equal(trainer.model.get_parameter("rgb.Mixed_5c.b0.conv3d.weight"), before)


def test_frozen_norms_keep_the_trunk_s_statistics() -> None:
    moved, trainer = step_once(model__freeze_trunk_norms=True)
    statistics = [name for name in moved if "running_" in name or "num_batches" in name]
    assert {name for name in statistics if not moved[name].any()} == {
        name for name in statistics if name.startswith(("Conv3d_", "Mixed_"))
    }
    assert trainer.model.get_submodule("rgb.attention_pred.bn").training
    assert not trainer.model.get_submodule("rgb.Mixed_5c.b0.bn").training
    assert moved["Mixed_5c.b0.bn.weight"].any()


def test_a_clipped_gradient_has_the_norm_and_the_log_the_one_before() -> None:
    """SGD without momentum and decay: the step is lr x gradient."""
    changes = {"optimizer__name": "sgd", "optimizer__momentum": 0.0, "optimizer__weight_decay": 0.0}
    free, without = step_once(optimizer__lr=1.0, **changes)
    parameters = [name for name, _ in without.model["rgb"].named_parameters()]
    norm = torch.stack([free[name].norm() for name in parameters]).norm().item()
    assert "gradient_norm_rgb" not in without.training_metrics(torch.zeros(1, 3))
    for limit, expected in ((norm / 4, norm / 4), (norm * 4, norm)):
        clipped, trainer = step_once(optimizer__lr=1.0, train__clip_norm=limit, **changes)
        assert torch.stack([clipped[name].norm() for name in parameters]).norm().item() == pytest.approx(
            expected, rel=1e-4
        )
        assert trainer.training_metrics(torch.zeros(1, 3))["gradient_norm_rgb"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("name", ["sgd", "ranger", "adamw", "muon"])
def test_an_overflow_skips_the_step_and_leaves_no_norm(name: str, tmp_path: Path) -> None:
    """The loss scale falls; the log has the norm of the last step that was taken, which can be read again."""
    config = tiny_config(optimizer__name=name, train__clip_norm=1.0, streams="rgb", train__precision="fp16")
    trainer = Trainer(config, ORIGIN, CPU)
    (stream,) = trainer.optimizers.values()
    weight = trainer.model.get_parameter("rgb.Mixed_5c.b0.conv3d.weight")
    before, scale = weight.detach().clone(), stream.scaler.get_scale()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    stream.scaler.scale(torch.zeros(1))  # the scaler starts with its first loss
    stream.step()
    assert torch.equal(weight, before) and stream.scaler.get_scale() == scale / 2 and stream.gradient_norm is None
    assert "gradient_norm_rgb" not in trainer.training_metrics(torch.zeros(1, 3))
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3 * stream.scaler.get_scale())
    stream.step()
    metrics = {"iteration": 1, **trainer.training_metrics(torch.zeros(1, 3))}
    assert not torch.equal(weight, before) and math.isfinite(metrics["gradient_norm_rgb"])
    write_metrics(str(tmp_path), [metrics])
    assert read_metrics(str(tmp_path)) == [metrics]


def test_gradients_are_clipped_without_the_loss_scale() -> None:
    config = tiny_config(optimizer__name="sgd", optimizer__lr=1.0, optimizer__momentum=0.0, train__clip_norm=1.0)
    p = nn.Parameter(torch.zeros(2))
    stream = StreamOptimizer(config, [ParameterRole(p)], CPU, scale_loss=True)
    stream.scaler.scale((p * torch.tensor([3.0, 4.0])).sum()).backward()
    stream.step()
    assert p.detach().tolist() == pytest.approx([-0.6, -0.8], rel=1e-4)
    assert stream.gradient_norm is not None and stream.gradient_norm.item() == pytest.approx(5.0, rel=1e-4)
