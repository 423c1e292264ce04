"""Compile every kernel as its launcher would, for the compute capability given as 80, 90, ...; nothing is launched.

    python tests/kernels/compile_kernels.py 90 [--float16]

Prints a line for each compilation: kernel, warps, shared memory, wide and narrow loads, multiplications and
additions that were fused unasked, roundings to bfloat16 one by one. Run by test_compiles.py.
"""

import math
import pathlib
import re
import sys
import types

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = pathlib.Path(__file__).resolve().parents[2]
package = types.ModuleType("ltx2_engine")
package.__path__ = [str(ROOT)]
sys.modules["ltx2_engine"] = package

from ltx2_engine import kernels  # noqa: E402
from ltx2_engine.kernels import Rows  # noqa: E402

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TOKENS, WIDTH, HEADS = 16, 4096, 32
STRENGTHS = {"cfg": 3.0, "stg": 1.0, "modality": 3.0}
LEVELS = {"sigma": 0.8, "sigma_next": 0.4, "sigma_down": 0.3, "alpha_ratio": 0.9, "fresh": 0.2}


class Driver:
    """A GPU that is not there."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only():
    """Let launches end after the compilation."""
    run = JITFunction.run

    def compiled(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        ptx, data = kernel.asm["ptx"], kernel.metadata
        wide, narrow = (
            sum(ptx.count(f"ld.global.{kind}") for kind in kinds) for kinds in (("v4", "v2"), ("b16", "u16"))
        )
        # libdevice's own are the only others; they flush denormal numbers
        fused = ptx.count("fma.rn.f32") + ptx.count("fma.rn.f16") - asked_for(kernel)
        single = ptx.count("cvt.rn.bf16.f32")
        print(
            f"{self.__name__} warps {data.num_warps} shared {data.shared} wide {wide} narrow {narrow} "
            f"fused {fused} single {single}"
        )
        return kernel

    JITFunction.run = compiled


def asked_for(kernel):
    """Fused multiplications and additions of a thread that the source has."""
    sizes = re.findall(r"math\.fma .*: tensor<([\dx]+)xf32>", kernel.asm["ttir"])
    threads = 32 * kernel.metadata.num_warps
    return sum(max(1, math.prod(map(int, size.split("x"))) // threads) for size in sizes)


def of(*shape, dtype=BF16):
    return torch.zeros(*shape, dtype=dtype)


def residual(dtype):
    x, values, index = (
        of(1, TOKENS, WIDTH, dtype=dtype),
        of(1, 3, 5, WIDTH, dtype=dtype),
        of(1, TOKENS, dtype=torch.long),
    )
    own = [Rows(values[:, :, j], index) for j in range(5)]
    shared = [Rows(values[:, :1, j]) for j in range(5)]
    run = kernels.residual_norm_modulate.twin
    two = ((own[0], own[1]), (own[2], own[3]))
    run(x, two, 1e-6, branch=x, gate=own[4], keep=of(1, 1, 1, dtype=dtype))
    run(x, two, 1e-6, branch=x, gate=own[4], quantize=True, fast=True)
    run(x, ((shared[0], shared[1]), None), 1e-6)
    run(x, (), 1e-6, branch=x, gate=shared[4])
    for quantize in (False, True):
        run(x, ((shared[0], shared[1]),), None, quantize=quantize)
    run(of(1, TOKENS, 100, dtype=dtype), (None,), 1e-6)


def attention(dtype):
    q, k, _ = of(1, TOKENS, 3 * WIDTH, dtype=dtype).chunk(3, -1)
    weight, cos = of(WIDTH, dtype=dtype), of(1, HEADS, TOKENS, WIDTH // HEADS // 2, dtype=dtype)
    for fast in (False, True):
        kernels.qk_norm_rotary.twin(q, k, weight, weight, cos, cos, 1e-6, fast=fast)
    kernels.norm_rotary.twin(q, weight, cos, cos, 1e-6)
    kernels.rms_norm.twin(q, weight, 1e-6)
    kernels.apply_split_rotary.twin(q.unflatten(-1, (HEADS, -1)).transpose(1, 2), cos, cos)
    for quantize in (False, True):
        kernels.head_gate.twin(q, of(1, TOKENS, HEADS, dtype=dtype), quantize=quantize)
    kernels.quantize_rows.twin(of(TOKENS, WIDTH, dtype=dtype))
    kernels.quantize_rows.twin(of(TOKENS, WIDTH, dtype=dtype), of(1, dtype=F32))
    for width in (4 * WIDTH, 1):
        kernels.gelu_quantize.twin(of(TOKENS, width, dtype=dtype))


def sampling():
    for dtype in (BF16, F32):
        passes = of(4, 1, TOKENS, 128, dtype=dtype)
        kernels.guidance_combine.twin(*passes, **STRENGTHS, rescale=0.7)
        kernels.guidance_combine.twin(passes[0], passes[1], None, None, **STRENGTHS, rescale=0.0)
    for dtype in (F64, F32):
        kernels.res2s_update.twin(*of(3, 1, TOKENS, 128, dtype=dtype), **LEVELS)


def vae(dtype):
    x = of(1, 128, 2, 16, 32, dtype=dtype)
    vector = of(1, 128, 1, 1, 1, dtype=dtype)
    last = x.to(memory_format=torch.channels_last_3d)
    kernels.pixel_norm_silu.twin(x, torch.empty_like(x), (vector, vector))
    kernels.pixel_norm_silu.twin(last, torch.empty_like(last))
    kernels.pixel_norm_silu.twin(x, torch.empty_like(x), fast=True)
    wide = of(1, 2048, 1, 3, 5, dtype=dtype)
    kernels.pixel_norm_silu.twin(wide, torch.empty_like(wide))
    kernels.depth_to_space.twin(x, (2, 2, 2), x[:, :64])
    kernels.depth_to_space.twin(x, (2, 1, 1))


def meeting():
    """It has no twin: processes that do not share a GPU's memory have other means."""
    from ltx2_engine.kernels.meet_triton import meet_kernel

    words = of(2, dtype=torch.int32)
    meet_kernel[(1,)](of(1, dtype=torch.int32), words, of(2, dtype=torch.int64), 0, SIZE=2, num_warps=1)


if __name__ == "__main__":
    driver.set_active(Driver(int(sys.argv[1])))
    compile_only()
    residual(BF16)
    attention(BF16)
    vae(BF16)
    sampling()
    meeting()
    if "--float16" in sys.argv:
        residual(F16)
        attention(F16)
        vae(F16)
