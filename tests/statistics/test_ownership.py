"""Parameters that another module than their owner reads, and weights that are computed."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.utils.prune as prune
from torch import nn
from torch.nn.utils import parametrizations

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore:.*through torch.func:UserWarning")


def check_against_single_samples(make, x):
    """Squares and gradients, each sample's own by a backward pass of its own."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().double())
    model, plain = models
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        statistics = fusedopt.PerSampleSquares(model)
    model(x).square().flatten(1).sum(1).mean().backward()
    names = dict(plain.named_parameters())
    expected = {name: torch.zeros_like(p) for name, p in names.items()}
    for row in x.split(1):
        plain.zero_grad()
        plain(row).square().flatten(1).sum(1).mean().backward()
        for name, p in names.items():
            expected[name] += p.grad.square() / len(x)
    plain.zero_grad()
    plain(x).square().flatten(1).sum(1).mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, names[name].grad, msg=name)
        torch.testing.assert_close(statistics.mean_square(p), expected[name], msg=name)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.a(x, x, x, need_weights=False)[0]


ATTENTION = {
    "weight norm of the output": lambda a: parametrizations.weight_norm(a.out_proj),
    "weight norm of the input": lambda a: parametrizations.weight_norm(a, "in_proj_weight"),
    "pruned input": lambda a: prune.l1_unstructured(a, "in_proj_weight", 0.5),
    "pruned bias of the input": lambda a: prune.random_unstructured(a, "in_proj_bias", 0.5),
}


@pytest.mark.parametrize("how", ATTENTION)
def test_attention_with_computed_weights(how):
    def make():
        model = Attends().double()
        ATTENTION[how](model.a)
        return model

    check_against_single_samples(make, torch.randn(5, 3, 4, dtype=torch.float64))


def test_an_output_that_attention_would_not_train_is_refused_at_construction():
    model = Attends()
    prune.l1_unstructured(model.a.out_proj, "weight", 0.5)
    with pytest.raises(RuntimeError, match=r"a \(MultiheadAttention\).*out_proj\.weight"):
        fusedopt.PerSampleSquares(model)


LAYERS = {
    "pruned bias": lambda m: prune.l1_unstructured(m, "bias", 0.5),
    "pruned weight": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("how", LAYERS)
def test_layers_with_computed_weights(how):
    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
        LAYERS[how](model[1])
        return model

    check_against_single_samples(make, torch.randn(5, 4, dtype=torch.float64))


class Lists(nn.Module):
    """Parameters in containers, nested, some of which share a name."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(2)])
        self.d = nn.ParameterDict({"b": nn.Parameter(torch.randn(4))})
        self.held = nn.Module()
        self.held.gain = nn.Parameter(torch.randn(4))
        self.h = nn.Linear(4, 2)

    def forward(self, x):
        return self.h((x @ self.w[0]).tanh() @ self.w[1] * self.held.gain + self.d["b"])


def test_parameters_in_containers_belong_to_who_reads_them():
    def make():
        return nn.Sequential(nn.Linear(4, 4), Lists())

    check_against_single_samples(make, torch.randn(5, 4, dtype=torch.float64))


def test_the_warning_names_the_reader_and_its_containers():
    with pytest.warns(UserWarning, match=r"0 \(Lists\).*w\.0, w\.1, d\.b, held\.gain"):
        fusedopt.PerSampleSquares(nn.Sequential(Lists()))
