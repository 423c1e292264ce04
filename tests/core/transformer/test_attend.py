"""Which implementation of attention is tried first, and that it changes nothing but last bits."""

import pytest
import torch
from ltx2_engine.ltx2_core.transformer import attend as attend_module
from ltx2_engine.ltx2_core.transformer.attend import IMPLEMENTATIONS, SWITCH, attend, order


@pytest.mark.parametrize(
    ("queries", "keys", "masked", "first"),
    [
        (15360, 15360, False, "cudnn"),
        (15360, 1024, False, "cudnn"),
        (15360, 126, False, "cudnn"),
        (126, 15360, False, "flash"),
        (126, 126, False, "cudnn"),
        (126, 15360, True, "cudnn"),
    ],
    ids=["self", "text", "audio to video", "video to audio", "audio", "with a bias"],
)
def test_each_kind_of_attention_has_its_implementation(queries, keys, masked, first):
    names = order(queries, keys, masked=masked)
    assert names[0] == first
    assert sorted(names) == sorted(IMPLEMENTATIONS), "none is left out: what one does not take the next one does"


@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
def test_the_choice_comes_first(choice):
    assert order(126, 15360, masked=False, choice=choice)[0] == choice


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match=rf"{SWITCH}='xformers' is not known; choose auto, cudnn, flash"):
        order(1, 1, masked=False, choice="xformers")


@pytest.fixture
def fresh(monkeypatch):
    attend_module._choice.cache_clear()
    yield monkeypatch
    attend_module._choice.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("choice", IMPLEMENTATIONS)
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (26, 2000)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_implementations_agree_on_a_gpu(fresh, choice, queries, keys, bias, dtype):
    fresh.setenv(SWITCH, choice)
    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    q, k, v = (randn(1, count, 4 * 64).unflatten(-1, (4, 64)).transpose(1, 2) for count in (queries, keys, keys))
    weights = randn(1, 1, queries, keys) if bias else None
    want = (
        torch.softmax(q.double() @ k.double().transpose(-1, -2) / 8 + (0 if weights is None else weights.double()), -1)
        @ v.double()
    )
    error = (attend(q, k, v, weights) - want).norm() / want.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-4)
