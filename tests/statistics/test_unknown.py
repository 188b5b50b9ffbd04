"""What an observed model cannot do says so, and training goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.utils.rnn import pack_sequence

import fusedopt

X = torch.randn(5, 4)


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    statistics = fusedopt.PerSampleSquares(model)
    return model, statistics, fusedopt.BatchDecoupledAdam(model.parameters(), statistics=statistics)


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


TRANSFORMS = {
    "vmap": lambda m: vmap(m)(X),
    "jvp": lambda m: jvp(m, (X,), (X,)),
    "jacrev": lambda m: jacrev(m)(X),
    "grad": lambda m: grad(lambda w: functional_call(m, w, (X,)).sum())(weights(m)),
    "trace": lambda m: torch.jit.trace(m, X),
    "export": lambda m: torch.export.export(m, (X,)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", TRANSFORMS)
def test_transforms_name_the_way_out_and_training_goes_on(how):
    model, statistics, optimizer = make()
    with pytest.raises(RuntimeError, match=r"observed by PerSampleSquares.*paused\(\)"):
        TRANSFORMS[how](model)
    with statistics.paused():
        TRANSFORMS[how](model)
    before = model[0].weight.detach().clone()
    model(X).square().mean().backward()
    optimizer.step()
    assert statistics.samples == 5 and not torch.equal(before, model[0].weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_is_refused_and_training_goes_on():
    model, statistics, optimizer = make()
    with pytest.raises(RuntimeError, match=r"observed by PerSampleSquares.*remove\(\)"):
        torch.jit.script(model)
    model(X).sum().backward()
    optimizer.step()
    scripted = torch.jit.script(copy.deepcopy(model))
    torch.testing.assert_close(scripted(X), model(X))


def test_a_graph_that_may_not_break_says_why():
    model, _, _ = make()
    with pytest.raises(Exception, match="PerSampleSquares observes"):
        torch.compile(model, fullgraph=True, backend="eager")(X)


@pytest.mark.filterwarnings("ignore:.*through torch.func:UserWarning")
def test_packed_sequences_and_bags_are_named():
    rnn = nn.GRU(4, 3)
    fusedopt.PerSampleSquares(rnn)
    with pytest.raises(RuntimeError, match=r"PackedSequence.*Pad"):
        rnn(pack_sequence([torch.randn(3, 4), torch.randn(2, 4)]))
    bags = nn.Sequential(nn.EmbeddingBag(7, 3))
    fusedopt.PerSampleSquares(bags)
    with pytest.raises(RuntimeError, match=r"0 \(EmbeddingBag\).*offsets.*\[batch, bag\]"):
        bags(torch.tensor([1, 2, 3]))


class Wrapper(nn.Module):
    """Hands attributes on to what it wraps, as Lightning's Fabric does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.ready = True

    def forward(self, x):
        return self.inner(x)

    def __setattr__(self, name, value):
        if "ready" in self.__dict__:
            setattr(self.inner, name, value)
        else:
            super().__setattr__(name, value)


def test_a_wrapper_that_hands_attributes_on():
    inner = nn.Sequential(nn.Linear(4, 2))
    wrapper = Wrapper(inner)
    statistics = fusedopt.PerSampleSquares(wrapper)
    wrapper(X).sum().backward()
    assert statistics.samples == 5
    statistics.remove()
    assert type(wrapper) is Wrapper and type(inner) is nn.Sequential
