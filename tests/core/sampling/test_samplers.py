"""The first-order samplers, and what every sampler has to keep: against tabulated values, formulas and oracles."""

import json
import math
from itertools import pairwise

import pytest
import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.sampling.ancestral import renoising
from ltx2_engine.ltx2_core.sampling.cfg_pp import CfgPPWeights
from ltx2_engine.ltx2_core.sampling.choice import SAMPLER_NAMES
from ltx2_engine.ltx2_core.sampling.noise import SamplerNoise
from ltx2_engine.ltx2_core.sampling.samplers import NEEDS_UNCOND, SAMPLERS, SamplerChoice, evaluations

CPU = torch.device("cpu")
SIGMAS = (0.975, 0.909375, 0.725, 0.421875, 0.0)


@pytest.fixture(scope="module")
def vectors(request):
    return json.loads((request.path.parents[2] / "data" / "sampling_vectors.json").read_text())


class Denoiser:
    """A denoiser from a formula: x0 = guided(x, sigma), kept tokens put back; records how it is called."""

    def __init__(self, guided, unguided=None, *, mask=None, clean=None):
        self.guided, self.mask, self.clean = guided, mask, clean
        self.uncond = unguided or guided
        self.calls, self.inputs, self.last = [], [], None

    def __call__(self, x, sigma, *, step, midpoint=False):
        self.calls.append((sigma, step, midpoint))
        self.inputs.append(x)
        self.last = x.map(lambda x: self.uncond(x, sigma).to(x.dtype))
        return self.blend(x.map(lambda x: self.guided(x, sigma).to(x.dtype)))

    def unguided(self):
        return self.last

    def blend(self, x):
        if self.mask is None:
            return x
        return x.map(lambda x, m, c: (x * m + c.to(x.dtype) * (1 - m)).to(x.dtype), self.mask, self.clean)


class Given:
    """Noise from a list of numbers in place of the generators."""

    def __init__(self, *values):
        self.values = iter(values)

    def step(self, x):
        value = next(self.values)
        return x.map(lambda x: torch.full_like(x, value))


def run(choice, denoise, x, sigmas, noise=None, on_step=lambda *_: None):
    if isinstance(choice, str):
        choice = SamplerChoice(choice)
    noise = noise or SamplerNoise(choice, 7, CPU)
    return SAMPLERS[choice.name](denoise, x, sigmas, noise, choice, on_step)


def scalar(value):
    return AV(torch.tensor([[[value]]], dtype=torch.float64))


def constant(value):
    return lambda x, sigma: torch.full_like(x, value)


def toy(x, sigma):
    return 0.25 + 0.4 * x * (1 - 0.5 * sigma)


def tokens(dtype, seed=0):
    torch.manual_seed(seed)
    return AV(torch.randn(1, 40, 16).to(dtype), torch.randn(1, 9, 16).to(dtype))


def test_ancestral_table(vectors):
    for case in vectors["euler_ancestral_rf"]:
        scale, amount = renoising(case["sigma_next"], case["sigma_down"])
        assert abs(scale - case["alpha_ratio"]) <= 1e-12
        assert abs(amount - case["renoise_coeff"]) <= 1e-12
        choice = SamplerChoice("euler_ancestral", eta=case["eta"])
        levels = (case["sigma"], case["sigma_next"])
        got = run(choice, Denoiser(constant(case["x0"])), scalar(case["x"]), levels, Given(case["noise"]))
        assert abs(float(got.video) - case["result"]) <= 1e-12


def test_sde_coefficients_from_sigma_down(vectors):
    for case in vectors["sde_coefficients_from_sigma_down"]:
        scale, amount = renoising(case["sigma_next"], case["sigma_down"])
        assert abs(scale - case["alpha_ratio"]) <= 1e-12
        assert abs(amount - case["sigma_up"]) <= 1e-12


def test_cfg_pp_table(vectors):
    for case in vectors["euler_cfg_pp"]:
        weights = CfgPPWeights.between(case["sigma"], case["sigma_next"], case["eta"])
        assert abs(weights.carried - case["sigma_down"]) <= 1e-12
        assert abs(weights.fresh - case["sigma_up_scaled"]) <= 1e-12
        assert abs((case["x"] - weights.alpha * case["x0_uncond"]) / weights.sigma - case["d"]) <= 1e-12
        denoise = Denoiser(constant(case["x0_cond"]), constant(case["x0_uncond"]))
        choice = SamplerChoice("euler_cfg_pp", eta=case["eta"])
        got = run(choice, denoise, scalar(case["x"]), (case["sigma"], case["sigma_next"]), Given(case["noise"]))
        assert abs(float(got.video) - case["result"]) <= 1e-12


@pytest.mark.parametrize(
    ("table", "sampler"), [("euler_trajectory", "euler"), ("gradient_estimation", "gradient_estimation")]
)
def test_trajectories(vectors, table, sampler):
    case = vectors[table]
    denoise = Denoiser(toy)
    end = run(sampler, denoise, scalar(case["x"][0]), case["sigmas"])
    got = [float(x.video) for x in (*denoise.inputs, end)]
    assert max(abs(a - b) for a, b in zip(got, case["x"], strict=True)) <= 1e-10


def test_gradient_estimation_follows_its_closed_form():
    """x' = x + v dt + (gamma - 1)(v - v_before) dt, with x0 itself at the end."""
    gamma, x, before = 1.7, 1.2, None
    for sigma, sigma_next in pairwise(SIGMAS):
        v = (x - toy(x, sigma)) / sigma
        if sigma_next == 0:
            x = toy(x, sigma)
        else:
            x += (v + (0.0 if before is None else (gamma - 1) * (v - before))) * (sigma_next - sigma)
        before = v
    got = run(SamplerChoice("gradient_estimation", gamma=gamma), Denoiser(toy), scalar(1.2), SIGMAS)
    assert abs(float(got.video) - x) <= 1e-12


def test_gamma_1_and_eta_0_are_euler():
    want = run("euler", Denoiser(toy), scalar(1.2), SIGMAS)
    plain = SamplerChoice("gradient_estimation", gamma=1.0), SamplerChoice("euler_ancestral", eta=0.0)
    # without guidance the noise that CFG++ carries on is the one that Euler does
    for choice in (*plain, SamplerChoice("euler_cfg_pp", eta=0.0)):
        got = run(choice, Denoiser(toy), scalar(1.2), SIGMAS)
        assert abs(float(got.video) - float(want.video)) <= 1e-12, choice.name


@pytest.mark.parametrize("name", ["euler_ancestral", "euler_cfg_pp"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_fresh_noise_keeps_the_level(name, eta):
    """From x = (1 - s) c + s n a step gives (1 - s') c + a n + b n' with a^2 + b^2 = s'^2."""
    sigma, sigma_next, choice = 0.909375, 0.725, SamplerChoice(name, eta=eta)

    def after(clean, old, new):
        x = scalar((1 - sigma) * clean + sigma * old)
        return float(run(choice, Denoiser(constant(clean)), x, (sigma, sigma_next), Given(new)).video)

    assert abs(after(1.0, 0.0, 0.0) - (1 - sigma_next)) <= 1e-12
    carried, fresh = after(0.0, 1.0, 0.0), after(0.0, 0.0, 1.0)
    assert fresh > 0.1
    assert abs(math.hypot(carried, fresh) - sigma_next) <= 1e-12


def test_weaker_noise_still_rescales_the_ancestral_step():
    choice = SamplerChoice("euler_ancestral", s_noise=0.0)
    got = run(choice, Denoiser(constant(-0.3)), scalar(0.8), (0.909375, 0.725), Given(0.4))
    sigma_down = 0.725**2 / 0.909375
    moved = sigma_down / 0.909375 * 0.8 + (1 - sigma_down / 0.909375) * -0.3
    assert abs(float(got.video) - (1 - 0.725) / (1 - sigma_down) * moved) <= 1e-12


def test_cfg_pp_at_full_noise_is_finite():
    x = AV(torch.randn(1, 4, 8))
    got = run("euler_cfg_pp", Denoiser(toy), x, (1.0, 0.99375, 0.0))
    assert bool(got.video.isfinite().all())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1]], ids=["to clean", "above clean"])
def test_a_clean_state_stays(name, sigmas):
    """x0 = x = c everywhere is a fixed point of every sampler that adds no noise."""
    choice = SamplerChoice(name, eta=0.0, substep_eta=0.0)
    seen = []
    denoise = Denoiser(constant(0.625))
    end = run(choice, denoise, scalar(0.625), sigmas, on_step=lambda _, x0: seen.append(float(x0.video)))
    states = [float(x.video) for x in (*denoise.inputs, end)]
    assert max(abs(x - 0.625) for x in states) <= 1e-12
    assert seen == [0.625] * (len(sigmas) - 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_constant_prediction_is_where_every_schedule_ends(name):
    got = run(name, Denoiser(constant(0.625)), tokens(torch.float32), SIGMAS)
    assert max(float((x - 0.625).abs().max()) for x in got.present()) <= 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1]], ids=["to clean", "above clean"])
def test_kept_tokens_come_back_bit_equal(name, dtype, sigmas):
    clean = tokens(dtype, seed=1)
    mask = clean.map(lambda c: (torch.arange(c.shape[1]) % 3 > 0).float().view(1, -1, 1))
    start = tokens(dtype).map(lambda x, m, c: torch.where(m > 0, x, c), mask, clean)
    # the model sees a kept token at level 0 and leaves it alone, whichever pass it is
    masks = {m.shape[1]: m for m in mask.present()}
    denoise = Denoiser(
        toy, lambda x, sigma: torch.where(masks[x.shape[1]] > 0, 0.9 * toy(x, sigma), x), mask=mask, clean=clean
    )
    got = run(name, denoise, start, sigmas)
    for x, m, c in zip(got.present(), mask.present(), clean.present(), strict=True):
        kept = (m == 0).expand_as(x)
        assert torch.equal(x[kept], c[kept])
        assert not torch.equal(x, c)


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_seeds_same_bits(name):
    x = tokens(torch.bfloat16)
    first, again = (run(name, Denoiser(toy), x, SIGMAS[:-1]) for _ in range(2))
    assert torch.equal(first.video, again.video)
    assert torch.equal(first.audio, again.audio)
    choice = SamplerChoice(name, sde_seed=5)
    other = run(choice, Denoiser(toy), x, SIGMAS[:-1])
    draws = name in ("euler_ancestral", "res_2s", "euler_cfg_pp")
    assert torch.equal(first.video, other.video) is not draws


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("missing", ["video", "audio"])
def test_either_stream_may_be_absent(name, missing):
    x = tokens(torch.bfloat16)
    x = AV(None, x.audio) if missing == "video" else AV(x.video)
    got = run(name, Denoiser(toy), x, SIGMAS)
    assert [part is None for part in (got.video, got.audio)] == [part is None for part in (x.video, x.audio)]
    assert all(part.dtype == torch.bfloat16 and bool(part.isfinite().all()) for part in got.present())


class OnMeta:
    def step(self, x):
        return x.map(lambda x: torch.empty_like(x, dtype=torch.float64))

    substep = step


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1]], ids=["to clean", "above clean"])
def test_no_tensor_is_read_on_the_host(name, sigmas):
    """Tensors without data: any value that a sampler asked for would raise."""
    x = tokens(torch.bfloat16).map(lambda x: x.to("meta"))
    denoise = Denoiser(toy, mask=x.map(lambda x: x.new_ones(1, x.shape[1], 1, dtype=torch.float32)), clean=x)
    got = run(name, denoise, x, sigmas, OnMeta())
    assert got.video.device.type == "meta"
    assert got.video.dtype == torch.bfloat16


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1], (1.0, 0.0)])
def test_evaluations_and_steps_are_counted(name, sigmas):
    denoise, steps = Denoiser(toy), []
    run(name, denoise, tokens(torch.float32), sigmas, on_step=lambda index, _: steps.append(index))
    assert len(denoise.calls) == evaluations(name, sigmas)
    assert steps == list(range(len(sigmas) - 1))
    assert [call[1] for call in denoise.calls if not call[2]][: len(steps)] == steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_may_stop_the_run(name):
    def stop(*_):
        raise InterruptedError

    denoise = Denoiser(toy)
    with pytest.raises(InterruptedError):
        run(name, denoise, tokens(torch.float32), SIGMAS, on_step=stop)
    assert {step for _, step, _ in denoise.calls} == {0}


def test_names_and_reference_settings():
    assert tuple(SAMPLERS) == SAMPLER_NAMES
    assert set(SAMPLERS) >= NEEDS_UNCOND == {"euler_cfg_pp"}
    found = {name: (c.eta, c.noise_kind, c.sde_seed) for name, c in ((name, SamplerChoice(name)) for name in SAMPLERS)}
    assert found["res_2s"] == (0.5, "normalised", -1)
    assert found["euler_ancestral"] == (1.0, "plain", "follow")
    assert found["euler_cfg_pp"] == (1.0, "plain", -1)
    assert SamplerChoice("euler_ancestral", eta=0.0).eta == 0.0
    assert SamplerChoice("res_2s") == SamplerChoice("res_2s", eta=0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"eta": -0.1},
        {"eta": 1.5},
        {"eta": "much"},
        {"substep_eta": float("nan")},
        {"s_noise": float("inf")},
        {"s_noise": -1.0},
        {"gamma": 11.0},
        {"bong": 1},
        {"noise_kind": "pink"},
        {"sde_seed": 1.5},
        {"sde_seed": 2**64},
        {"sde_seed": "mine"},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name.split("_")[0]):
        SamplerChoice("res_2s", **settings)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match=r"'heun'.*res_2s"):
        SamplerChoice("heun")


def gaussian(mean, deviation):
    """The exact x0 of data that is normal, and where a sample at one level goes at another."""

    def x0(x, sigma):
        alpha, spread = 1 - sigma, ((1 - sigma) * deviation) ** 2 + sigma**2
        return mean + deviation**2 * alpha / spread * (x - alpha * mean)

    def moved(x, sigma, sigma_next):
        before, after = (math.hypot((1 - s) * deviation, s) for s in (sigma, sigma_next))
        return (1 - sigma_next) * mean + after / before * (x - (1 - sigma) * mean)

    return x0, moved


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("bong", [True, False])
def test_convergence_order(name, bong):
    """Without noise, against the exact flow of normal data: Euler and its kin have order 1, res_2s has order 2."""
    x0, exact = gaussian(0.7, 0.4)
    high, low, start = 0.9, 0.1, 1.3
    choice = SamplerChoice(name, eta=0.0, substep_eta=0.0, bong=bong)
    counts = (16, 32, 64, 128, 256)
    errors = []
    for count in counts:
        levels = [high + (low - high) * i / count for i in range(count + 1)]
        got = run(choice, Denoiser(x0), scalar(start), levels)
        errors.append(abs(float(got.video) - exact(start, high, low)))
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    print(f"{name}, bong {bong}: errors {errors[0]:.1e} to {errors[-1]:.1e}, orders", *(f"{s:.3f}" for s in slopes))
    # a gamma of 1.5 would be Adams-Bashforth and of order 2; other values are of order 1
    order = 2 if name == "res_2s" else 1
    assert abs(slopes[-1] - order) <= 0.1


@pytest.mark.reference
def test_ancestral_equals_diffusers(diffusers):
    """Its scheduler adds 1e-12 to denominators and takes the velocity in place of x0."""
    scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=1.0, s_noise=1.0)
    scheduler.set_timesteps(sigmas=list(SIGMAS))
    source = torch.Generator().manual_seed(-1 % 2**64)
    want = start = torch.randn(1, 40, 16, generator=torch.Generator().manual_seed(1))
    for timestep, sigma in zip(scheduler.timesteps, SIGMAS, strict=False):
        velocity = (want - toy(want, sigma)) / sigma
        want = scheduler.step(velocity, timestep, want, generator=source).prev_sample
    choice = SamplerChoice("euler_ancestral", sde_seed=-1)
    got = run(choice, Denoiser(toy), AV(start), SIGMAS)
    assert (got.video - want).abs().max() <= 2e-6 * want.abs().max()
