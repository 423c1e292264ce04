"""res_2s against tabulated trajectories, 50-digit phi functions, the reference's iteration and ltx-core."""

import json
import math

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.sampling.phi import phi
from ltx2_engine.ltx2_core.sampling.res2s import LAST_SIGMA, Res2sWeights, SdeWeights, sample_res_2s, sde_step


@pytest.fixture(scope="module")
def vectors(request):
    return json.loads((request.path.parents[2] / "data" / "sampling_vectors.json").read_text())


class Denoiser:
    """x0 = function(x, sigma); records its inputs and the levels at which it is asked."""

    def __init__(self, function, mask=1.0, clean=0.0):
        self.function, self.mask, self.clean = function, mask, clean
        self.calls, self.inputs = [], []

    def __call__(self, x, sigma, *, step, midpoint=False):
        self.calls.append((sigma, step, midpoint))
        self.inputs.append(x)
        return self.blend(x.map(lambda x: self.function(x, sigma)))

    def blend(self, x):
        return x.map(lambda x: self.mask * x + (1 - self.mask) * self.clean)


class Given:
    """Noise from two lists of numbers in place of the generators."""

    def __init__(self, step, substep):
        self.streams = iter(step), iter(substep)

    def step(self, x, stream=0):
        value = next(self.streams[stream])
        return x.map(lambda x: torch.full_like(x, value))

    def substep(self, x):
        return self.step(x, 1)


def toy(x, sigma):
    return 0.25 + 0.4 * x * (1 - 0.5 * sigma)


def scalar(value):
    return torch.tensor([[[value]]], dtype=torch.float64)


def run(denoise, x, sigmas, noise, on_step=lambda *_: None, **settings):
    return sample_res_2s(denoise, AV(x), sigmas, noise, SamplerChoice("res_2s", **settings), on_step).video


def test_coefficients(vectors):
    worst = 0.0
    for case in vectors["res2s_coefficients"]:
        h, weights = case["h"], Res2sWeights.of(case["h"])
        got = {
            **{f"phi{j}_neg_h": phi(j, -h) for j in (1, 2, 3)},
            "phi1_neg_h_half": phi(1, -h / 2),
            "a21": weights.a21,
            "b1": weights.b1,
            "b2": weights.b2,
            "h_a21": h * weights.a21,
        }
        worst = max(worst, *(abs(value - case[name]) for name, value in got.items()))
    print(f"res_2s coefficients: {worst:.1e}")
    assert worst <= 1e-12


def test_phi_against_50_digits():
    mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed")
    mpmath.mp.dps = 50
    magnitudes = [10 ** (-12 + 13.7 * i / 400) for i in range(400)] + [0.999, 1.0, 1.001, 5.9494, 50.0]
    worst = dict.fromkeys((1, 2), 0.0)
    for magnitude in magnitudes:
        for z in (magnitude, -magnitude):
            exact = mpmath.expm1(z) / mpmath.mpf(z)
            for order in worst:
                worst[order] = max(worst[order], abs(float((mpmath.mpf(phi(order, z)) - exact) / exact)))
                exact = (exact - 1 / mpmath.factorial(order)) / mpmath.mpf(z)
    print("phi, relative error:", *(f"order {order} {error:.1e}" for order, error in worst.items()))
    assert max(worst.values()) <= 1e-14
    assert [phi(order, 0.0) for order in (1, 2, 3)] == [1.0, 1 / 2, 1 / 6]


def test_sde_coefficients(vectors):
    worst = 0.0
    for case in vectors["sde_coefficients"]:
        got = SdeWeights.of(case["sigma_next"], case["eta"])
        names = {
            "alpha_ratio": "alpha_ratio",
            "sigma_down": "sigma_down",
            "kept": "sigma_residual",
            "fresh": "sigma_up",
        }
        worst = max(worst, *(abs(getattr(got, ours) - case[theirs]) for ours, theirs in names.items()))
    print(f"SDE coefficients: {worst:.1e}")
    assert worst <= 1e-12


def test_sde_step(vectors):
    for case in vectors["sde_step"]:
        x, target, noise = (scalar(case[name]) for name in ("x", "x_next_deterministic", "noise"))
        levels = {name: case[name] for name in ("sigma", "sigma_next", "eta")}
        assert abs(float(sde_step(x, target, noise, **levels)) - case["result"]) <= 1e-12


def test_a_terminal_sde_step_is_its_target_whatever_the_levels_are():
    x, target = torch.randn(1, 4, 8), torch.randn(1, 4, 8, dtype=torch.float64)
    got = sde_step(x, target, None, sigma=0.0, sigma_next=0.0, terminal=True)
    assert torch.equal(got, target.float())


def test_trajectories(vectors):
    """Every tabulated schedule: final values, and the inner states of the steps where they are listed."""
    worst = 0.0
    for case in vectors["res2s_trajectory"]:
        denoise = Denoiser(toy)
        noise = Given(case["noise_step"], case["noise_substep"])
        got = run(denoise, scalar(case["x_init"]), case["sigmas"], noise, eta=case["eta_step"])
        worst = max(worst, abs(float(got) - case["final"]))
        for index, step in enumerate(case["steps"]):
            first, middle = denoise.calls[2 * index : 2 * index + 2]
            assert (first[1:], middle[1:]) == ((index, False), (index, True))
            assert first[0] == step["sigma"]
            worst = max(worst, abs(middle[0] - step["sub_sigma"]))
            worst = max(worst, abs(float(denoise.inputs[2 * index + 1].video) - step["x_mid_noised"]))
            after = got if 2 * index + 2 == len(denoise.inputs) else denoise.inputs[2 * index + 2].video
            worst = max(worst, abs(float(after) - step["x_next"]))
        if case["sigmas"][-1] == 0.0:
            assert denoise.calls[-1] == (LAST_SIGMA, len(case["sigmas"]) - 1, False)
    print(f"res_2s trajectories: {worst:.1e}")
    assert worst <= 1e-9


def test_closed_form_bong_is_100_rounds():
    source = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(300):
        h = float(torch.rand(1, generator=source, dtype=torch.float64)) * 0.5
        anchor, middle, x0 = 3 * torch.randn(3, 1, 5, 8, generator=source, dtype=torch.float64)
        weights = Res2sWeights.of(h)
        iterated = anchor
        for _ in range(100):
            iterated = middle - h * weights.a21 * (x0 - iterated)
        worst = max(worst, float((weights.refine_anchor(middle, x0) - iterated).abs().max()))
    print(f"bong, closed form against 100 rounds: {worst:.1e}")
    assert worst <= 1e-11


def test_bong_leads_to_the_noised_midpoint():
    weights = Res2sWeights.of(0.3)
    middle, x0 = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    assert (weights.to_middle(weights.refine_anchor(middle, x0), x0) - middle).abs().max() <= 1e-14


@pytest.mark.parametrize(
    ("levels", "refines"),
    [((0.909375, 0.725), True), ((0.725, 0.421875), False), ((0.0301, 0.025), True), ((0.03, 0.025), False)],
    ids=["fine", "coarse", "above 0.03", "at 0.03"],
)
def test_bong_is_for_fine_steps_above_the_lowest_levels(levels, refines):
    with_bong, without = (
        float(run(Denoiser(toy), scalar(1.2), levels, Given([0.3], [0.5]), bong=bong)) for bong in (True, False)
    )
    assert (abs(with_bong - without) > 1e-6) is refines


@pytest.mark.parametrize("mask", [0.0, 0.4])
def test_masks_are_applied_after_midpoint_and_step(mask):
    clean = 0.7
    denoise = Denoiser(toy, mask, clean)
    got = run(denoise, scalar(1.2), (0.909375, 0.725), Given([0.3], [-0.5]))
    # the formulas of the loop, spelled out
    sigma, sigma_next, x = 0.909375, 0.725, 1.2
    h, middle_sigma = math.log(sigma / sigma_next), math.sqrt(sigma * sigma_next)

    def kept(value):
        return mask * value + (1 - mask) * clean

    def renoised(start, end, level, noise):
        up, direction = 0.5 * level, (start - end) / (sigma - level)
        rest = math.sqrt(level**2 - up**2)
        return (1 - level + rest) * (start - sigma * direction) + rest * direction + up * noise

    first = kept(toy(x, sigma))
    pull = 1 - math.exp(-h / 2)
    middle = kept(renoised(x, x + pull * (first - x), middle_sigma, -0.5))
    start = (middle - pull * first) / (1 - pull)
    second = kept(toy(middle, middle_sigma))
    b2 = 2 * (math.exp(-h) - 1 + h) / h**2
    b1 = (1 - math.exp(-h)) / h - b2
    end = start + h * (b1 * (first - start) + b2 * (second - start))
    assert abs(float(got) - kept(renoised(start, end, sigma_next, 0.3))) <= 1e-12


def test_eta_0_is_a_step_without_noise():
    got = run(Denoiser(toy), scalar(1.2), (0.909375, 0.725, 0.0), Given([], []), eta=0.0, substep_eta=0.0)
    assert bool(got.isfinite())


def test_the_reported_x0_is_the_midpoints_and_at_last_the_closing_one():
    seen, denoise = [], Denoiser(toy)
    end = run(
        denoise, scalar(1.2), (0.9, 0.5, 0.0), Given([0.1] * 2, [0.2] * 2), lambda i, x0: seen.append((i, x0.video))
    )
    middle_sigma, middle = math.sqrt(0.9 * 0.5), denoise.inputs[1].video
    assert [index for index, _ in seen] == [0, 1]
    assert torch.equal(seen[0][1], toy(middle, middle_sigma))
    assert torch.equal(seen[1][1], end)


def test_a_level_below_the_last_one_is_refused():
    with pytest.raises(ValueError, match=r"0\.0011.*0\.001"):
        run(Denoiser(toy), scalar(1.2), (0.5, 0.001, 0.0), Given([], []))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_stored_in_their_own_dtype(dtype):
    """Arithmetic in float64: one storing of the whole step, not one of every operation."""
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8).to(dtype)
    denoise = Denoiser(lambda x, sigma: toy(x.double(), sigma).to(x.dtype))
    got = run(denoise, x, (0.909375, 0.725), Given([0.25], [0.5]))
    assert {part.video.dtype for part in denoise.inputs} | {got.dtype} == {dtype}
    answers = iter(
        [
            toy(part.video.double(), call[0]).to(dtype).double()
            for part, call in zip(denoise.inputs, denoise.calls, strict=True)
        ]
    )
    want = run(Denoiser(lambda *_: next(answers)), x.double(), (0.909375, 0.725), Given([0.25], [0.5]))
    assert torch.equal(got, want.to(dtype))


@pytest.mark.reference
def test_sde_step_equals_ltx_core(ltx_core):
    from ltx_core.components.diffusion_steps import Res2sDiffusionStep

    levels = torch.tensor([1.0, 0.99375, 0.909375, 0.725, 0.421875, LAST_SIGMA, 0.0], dtype=torch.float64)
    torch.manual_seed(0)
    worst = 0.0
    for index, (sigma, sigma_next) in enumerate(zip(levels.tolist(), levels.tolist()[1:], strict=False)):
        x, target, noise = torch.randn(3, 1, 50, 16, dtype=torch.float64)
        want = Res2sDiffusionStep().step(x, target, levels, index, noise)
        got = sde_step(x, target, noise, sigma=sigma, sigma_next=sigma_next, eta=0.5, terminal=sigma_next == 0.0)
        worst = max(worst, float((got - want).abs().max()))
    print(f"SDE step against ltx-core 1.0.0: {worst:.1e}")
    assert worst <= 1e-12
