"""Kernels run in Triton's interpreter where there is no GPU, and compiled where there is one."""

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _nan_filled(made):
    return made.fill_(float("nan")) if made.is_floating_point() else made


@pytest.fixture
def device(monkeypatch):
    """Where kernels run in this test. What they do not write reads as NaN."""
    pytest.importorskip("triton", reason="triton is not installed")
    from ltx2_engine.kernels import dispatch

    monkeypatch.setattr(dispatch, "interpreter", DEVICE.type == "cpu")
    fresh = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: _nan_filled(fresh(*args, **kwargs)))
    for operation in dispatch.OPERATIONS.values():
        operation.reset()
    yield DEVICE
    for operation in dispatch.OPERATIONS.values():
        operation.reset()


@pytest.fixture
def agree(device):
    """A function that runs an operation's twin on arguments and holds it against the definition, by its contract."""

    def check(operation, *args, **kwargs):
        got = operation.twin(*args, **kwargs)
        wrong = operation.contract.difference(operation.definition(*args, **kwargs), got)
        assert wrong is None, wrong
        return got

    return check


@pytest.fixture
def randn(device):
    """A function like torch.randn with a dtype, on the device; every call of a test gives other numbers."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    return make


@pytest.fixture
def traced():
    """A function that compiles a call in one graph and returns its result and the pack's operators in that graph."""

    def run(call, *args):
        found = set()

        def backend(graph, _):
            found.update(str(node.target) for node in graph.graph.nodes if "ltx2_engine" in str(node.target))
            return graph.forward

        torch.compiler.reset()
        result = torch.compile(call, backend=backend, fullgraph=True)(*args)
        return result, found

    return run
