"""Which implementation of attention is tried first, and that it changes nothing but last bits."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
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
    def forget():
        attend_module._choice.cache_clear()
        attend_module._package.cache_clear()

    forget()
    yield monkeypatch
    forget()


def heads_last(q, k, v):
    """softmax(q k^T / sqrt(D)) v of [B, T, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def module(name, **functions):
    made = types.ModuleType(name)
    vars(made).update(functions)
    return made


@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize("choice", ["sage", "fa3"])
def test_packages_are_called_as_they_want_it(fresh, choice, with_sums):
    """By stand-ins with the signatures of SageAttention 2 and FlashAttention 3."""

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        assert (tensor_layout, is_causal, sm_scale) == ("HND", False, None)
        return F.scaled_dot_product_attention(q, k, v)

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
        assert (softmax_scale, causal) == (None, False)
        out = heads_last(q, k, v)
        return (out, None) if with_sums else out

    fresh.setitem(sys.modules, "sageattention", module("sageattention", sageattn=sageattn))
    fresh.setitem(sys.modules, "flash_attn_interface", module("flash_attn_interface", flash_attn_func=flash_attn_func))
    q, k, v = (torch.randn(2, 3, count, 64) for count in (5, 7, 7))
    torch.testing.assert_close(attend_module._package(choice)(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_a_package_that_is_not_there_is_said_once(fresh, caplog):
    fresh.setitem(sys.modules, "sageattention", None)
    assert attend_module._package("sage") is None
    assert attend_module._package("sage") is None
    assert caplog.text.count("sageattention cannot be used") == 1
    assert order(10, 10, masked=False, choice="sage")[0] == "cudnn"


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
