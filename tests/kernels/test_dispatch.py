"""Which form of an operation runs, and that it is the right one."""

import logging

import pytest
import torch
from ltx2_engine import kernels
from ltx2_engine.kernels import (
    Rows,
    apply_split_rotary,
    dispatch,
    head_gate,
    norm_rotary,
    pixel_norm_silu,
    qk_norm_rotary,
    quantize_rows,
    residual_norm_modulate,
)
from ltx2_engine.kernels.contract import CLOSE, EXACT
from ltx2_engine.kernels.dispatch import Operation, Unfit

EPS = 1e-6


@pytest.fixture
def doubled(device, caplog):
    """A function that makes an operation x -> 2 x with a twin of the test's choice."""
    caplog.set_level(logging.INFO, logger="ltx2.kernels")

    def make(twin, *, contract=EXACT, fit=lambda x: x.shape[-1]):
        def double(x):
            return 2 * x

        operation = Operation(double, lambda: twin, fit, lambda x: ((x[:256],), {}), contract, dispatch.HALF)
        made.append(operation.name)
        return operation

    made: list[str] = []
    yield make
    for name in made:
        dispatch.OPERATIONS.pop(name, None)


def ones(device, *shape, dtype=torch.bfloat16):
    return torch.ones(*shape, dtype=dtype, device=device)


def test_twin_runs_after_it_agreed_once_for_each_kind(doubled, device):
    seen = []

    def twin(x):
        seen.append(tuple(x.shape))
        return x + x

    double = doubled(twin)
    for shape in ((1000, 4), (7, 4), (5, 8)):
        double(ones(device, *shape))
    assert seen == [(256, 4), (1000, 4), (7, 4), (5, 8), (5, 8)]
    assert dispatch.statistics()["double"] == {"triton": 3}


@pytest.mark.parametrize("fault", ["value", "nan", "shape", "dtype", "error"])
def test_a_twin_that_fails_is_never_used(doubled, device, caplog, fault):
    def twin(x):
        if fault == "error":
            raise RuntimeError("no such instruction\nlong story")
        wrong = {"value": 2.01 * x, "nan": x * float("nan"), "shape": (x + x)[:1], "dtype": (x + x).float()}
        return wrong[fault]

    double = doubled(twin, contract=CLOSE)
    x = ones(device, 300, 4)
    for _ in range(2):
        assert torch.equal(double(x), 2 * x)
    assert double.counts == {"failed its check": 2}
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "double" in warning.message
    assert "long story" not in warning.message


def test_reasons_are_counted_and_told_once(doubled, device, caplog):
    def fit(x):
        raise Unfit("odd")

    double = doubled(lambda x: x + x, fit=fit)
    for _ in range(3):
        double(ones(device, 2, 4))
    assert double.counts == {"odd": 3}
    assert [record.message for record in caplog.records] == ["kernels: double runs in plain torch: odd"]


def test_what_holds_for_every_operation_is_told_in_one_line(monkeypatch, caplog):
    """On a machine without a GPU, and for a dtype that no twin takes."""
    dispatch._say_once.cache_clear()
    monkeypatch.setattr(dispatch, "interpreter", False)
    x = torch.ones(1, 2, 4)
    with caplog.at_level(logging.INFO, "ltx2.kernels"):
        for operation in (kernels.head_gate, kernels.quantize_rows, kernels.gelu_quantize):
            operation.reset()
            operation(*([x, torch.ones(1, 2, 2)] if operation is kernels.head_gate else [x]))
    assert [record.message for record in caplog.records] == ["kernels: plain torch: not on a GPU"]
    caplog.clear()
    monkeypatch.setattr(dispatch, "refusal", lambda device: None)
    with caplog.at_level(logging.INFO, "ltx2.kernels"):
        for operation in (kernels.head_gate, kernels.quantize_rows, kernels.gelu_quantize):
            operation.reset()
            operation(*([x, torch.ones(1, 2, 2)] if operation is kernels.head_gate else [x]))
    assert [record.message for record in caplog.records] == ["kernels: plain torch: torch.float32"]
    dispatch._say_once.cache_clear()


def test_gradients_take_the_definition(doubled, device):
    double = doubled(lambda x: x + x)
    double(ones(device, 2, 4).requires_grad_()).sum().backward()
    with torch.no_grad():
        double(ones(device, 2, 4).requires_grad_())
    assert double.counts == {"gradients are wanted": 1, "triton": 1}


def test_warm_up_checks_ahead_and_switch_off_lasts(doubled, device):
    double = doubled(lambda x: x + x)
    assert double.warm_up(ones(device, 2, 4)) is None
    assert double.counts == {}
    double.switch_off("another rank does")
    double(ones(device, 2, 4))
    assert double.counts == {"another rank does": 1}


def test_unchecked_twins_do_not_run_where_nothing_may_wait(doubled, device, monkeypatch):
    double = doubled(lambda x: x + x)
    monkeypatch.setattr(dispatch, "_may_wait", lambda device: False)
    double(ones(device, 2, 4))
    assert double.counts == {"not yet checked": 1}
    double.reset()
    compiled = torch.compile(double.__call__, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ones(device, 2, 4)), 2 * ones(device, 2, 4))


def test_cpu_tensors_reach_kernels_in_these_tests_only(doubled, device, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreter", False)
    double = doubled(lambda x: pytest.fail("the twin ran"))
    double(torch.ones(2, 4, dtype=torch.bfloat16))
    assert double.counts == {"not on a GPU": 1}


def table(device, heads=4, tokens=3, half=8, dtype=torch.bfloat16):
    return ones(device, 1, heads, tokens, half, dtype=dtype)


# name -> operation, arguments, reason. x is [2, 3, 64] of ones
UNFIT = {
    "float8": (quantize_rows, lambda x: (x.to(torch.float8_e5m2),), "torch.float8_e5m2"),
    "mixed dtypes": (residual_norm_modulate, lambda x: (x, ((Rows(x), Rows(x.float())),), EPS), "mixed dtypes"),
    "three outputs": (residual_norm_modulate, lambda x: (x, (None,) * 3, EPS), "more than two outputs"),
    "empty": (residual_norm_modulate, lambda x: (x[:, :0], (None,), EPS), "empty"),
    "last axis": (
        residual_norm_modulate,
        lambda x: (x.mT.contiguous().mT, (None,), EPS),
        "last axis not contiguous",
    ),
    "two kinds of rows": (
        residual_norm_modulate,
        lambda x: (x, ((Rows(x), Rows(x[:, :1])),), EPS),
        "scale and shift of different",
    ),
    "two indices": (
        residual_norm_modulate,
        lambda x: (
            x,
            (tuple(Rows(x, torch.zeros(2, 3, dtype=torch.long, device=x.device)) for _ in range(2)),),
            EPS,
        ),
        "scale and shift of different tokens",
    ),
    "three heads": (head_gate, lambda x: (x[..., :48], x[..., :3]), "heads not a power of two"),
    "odd heads": (
        norm_rotary,
        lambda x: (x[..., :48], x[0, 0, :48], *(table(x.device, half=6),) * 2, EPS),
        "heads not a power of two",
    ),
    "table of another width": (
        norm_rotary,
        lambda x: (x, x[0, 0], *(table(x.device, heads=8),) * 2, EPS),
        "shape of the tables",
    ),
    "tables of two layouts": (
        apply_split_rotary,
        lambda x: (
            x.unflatten(-1, (4, 16)).transpose(1, 2),
            table(x.device),
            table(x.device).transpose(1, 2).contiguous().transpose(1, 2),
        ),
        "tables of different shapes",
    ),
    "rows apart": (quantize_rows, lambda x: (x[..., :32],), "rows not contiguous"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_a_twin_does_not_take_is_computed_all_the_same(device, name):
    operation, arguments, reason = UNFIT[name]
    x = ones(device, 2, 3, 64)
    if reason == "shape of the tables":
        assert operation.warm_up(*arguments(x)) == reason
        return
    if "float8" in reason or reason.startswith("more"):
        operation(*arguments(x))
    else:
        got, want = (run(*arguments(x)) for run in (operation, operation.definition))
        assert EXACT.difference(want, got) is None
    (counted,) = operation.counts
    assert counted.startswith(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_of_the_interpreter(device, dtype):
    """float32 has a twin in the interpreter, for the tests of formulas; on a GPU it takes the definition."""
    x, cos = ones(device, 2, 3, 64, dtype=dtype), table(device, dtype=dtype)
    calls = [
        (residual_norm_modulate, (x, (None,), EPS)),
        (qk_norm_rotary, (x, x, x[0, 0], x[0, 0], cos, cos, EPS)),
        (head_gate, (x, x[..., :4])),
    ]
    for operation, arguments in calls:
        got, want = (run(*arguments) for run in (operation, operation.definition))
        assert operation.contract.difference(want, got) is None
        expected = "triton" if device.type == "cpu" or dtype != torch.float32 else "torch.float32"
        assert dict(operation.counts) == {expected: 1}


def test_check_of_an_operation_in_place_leaves_its_output_alone(device, monkeypatch):
    x, out = ones(device, 1, 4, 1, 2, 3), torch.zeros(1, 4, 1, 2, 3, dtype=torch.bfloat16, device=device)
    assert pixel_norm_silu.warm_up(x, out) is None
    assert (out == 0).all()


def test_switch(monkeypatch):
    monkeypatch.setenv(dispatch.SWITCH, "torch")
    assert dispatch._looked_up(torch.device("cuda"))[0] == "LTX2_KERNELS=torch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_once_checked(device):
    x = ones(device, 1, 1000, 2048)
    residual_norm_modulate.warm_up(x[:, :2], (None,), EPS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        residual_norm_modulate(x, (None,), EPS)
        head_gate(x, x[..., :32])  # never checked: the definition
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert residual_norm_modulate.counts == {"triton": 1}
    assert head_gate.counts == {"not yet checked": 1}
