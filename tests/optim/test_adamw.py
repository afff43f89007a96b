"""AdamW against the paper's formula, and the state it keeps."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entrenar.optim.adamw import make_adamw

_LR, _BETAS, _EPS = 0.03, (0.8, 0.95), 1e-6


def _parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(4))]


def _gradients(step: int, parameters: list[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(parameter.shape, generator=generator) for parameter in parameters]


def _paper(start: np.ndarray, gradients: list[np.ndarray], decay: float) -> np.ndarray:
    """Loshchilov and Hutter 2019, algorithm 2, in float64 (the decay scaled by the learning rate, as in PyTorch)."""
    (b1, b2), x = _BETAS, start.astype(np.float64)
    m = v = np.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        x = x - _LR * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + _EPS) + decay * x)
    return x


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_twenty_updates_are_the_papers(decay: float) -> None:
    parameters = _parameters()
    start = [parameter.detach().clone().numpy() for parameter in parameters]
    optimizer = make_adamw(iter(parameters), _LR, _BETAS, _EPS, decay)
    for step in range(20):
        for parameter, gradient in zip(parameters, _gradients(step, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
    for number, parameter in enumerate(parameters):
        gradients = [_gradients(step, parameters)[number].double().numpy() for step in range(20)]
        expected = _paper(start[number], gradients, decay)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=2e-5, atol=2e-6)


def test_the_state_is_two_float32_tensors_a_parameter() -> None:
    """The memory plan counts on it. They are there before the first step, as PyTorch would make them in it."""
    parameters = _parameters()
    optimizer = make_adamw(parameters, _LR, _BETAS, _EPS, 0.0)
    before = {parameter: dict(optimizer.state[parameter]) for parameter in parameters}
    theirs = torch.optim.AdamW(parameters, lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=0.0, fused=True)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    values = [parameter.detach().clone() for parameter in parameters]
    theirs.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    optimizer.step()
    for parameter in parameters:
        assert all(optimizer.state[parameter][name] is value for name, value in before[parameter].items())
        torch.testing.assert_close(optimizer.state[parameter], theirs.state[parameter], atol=0, rtol=0)
        large = {name: value for name, value in optimizer.state[parameter].items() if value.dim()}
        assert large.keys() == {"exp_avg", "exp_avg_sq"}
        assert all((value.dtype, value.shape) == (torch.float32, parameter.shape) for value in large.values())


def test_the_learning_rate_of_a_group_can_be_set_before_each_update() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = make_adamw([parameter], 1.0, _BETAS, 0.0, 0.0)
    parameter.grad = torch.tensor([1.0, -5.0, 0.25])
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.125, 0.125, -0.125]))
