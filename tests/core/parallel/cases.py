"""What one rank computes: attention by itself, and evaluations of tiny models. Everything is drawn alike on every rank."""

import contextlib
from dataclasses import dataclass, replace
from unittest import mock

import torch
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning import state as tokens
from ltx2_engine.ltx2_core.config.transformer import TransformerConfig
from ltx2_engine.ltx2_core.evaluate import EVALUATIONS, grouped_evaluate
from ltx2_engine.ltx2_core.parallel.context import SINGLE, WHOLE, Split
from ltx2_engine.ltx2_core.parallel.groups import ONE_GROUP
from ltx2_engine.ltx2_core.sampling.denoise import Denoiser
from ltx2_engine.ltx2_core.sampling.guidance import GuidancePass, StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.tiny import tiny_config
from ltx2_engine.ltx2_core.transformer.attention import Attention
from ltx2_engine.ltx2_core.transformer.heads import KeysValues, SplitKeysValues, attend_among, attend_given
from ltx2_engine.ltx2_core.transformer.model import Transformer
from ltx2_engine.ltx2_core.transformer.rope import CrossRotary, Rotary

COND, UNCOND = GuidancePass("cond"), GuidancePass("uncond", negative=True)
PERTURBED = GuidancePass("perturbed", skip_video_self_attn_blocks=(1,), skip_audio_self_attn_blocks=(1,))
ISOLATED = GuidancePass("isolated", disable_a2v_cross_attn=True, disable_v2a_cross_attn=True)
ALL_PASSES = (COND, UNCOND, PERTURBED, ISOLATED)
HEADS, HEAD_DIM = 4, 8

# a build of the model that gathers the tables in every block
GATHERED = "gathered"
# those that differ only in where keys are rotated and where the tables come from, and the cases that tell them apart
ROTATIONS = ("heads", "heads_late", GATHERED)
ROTATED = ("uneven", "an empty share", "user masks")


CLIP = ClipShape(17, 64, 128, 24.0)  # 3 x 2 x 4 tokens
BOTH = AV(True, True)


@dataclass(frozen=True)
class Case:
    """One evaluation. appended: conditioning tokens behind the clip's. weighted: attention weights of the user's masks."""

    label: str = "2.3"
    clip: ClipShape = CLIP
    audio: int = 18
    batch: int = 1
    appended: int = 0
    weighted: bool = False
    kept: bool = True
    passes: tuple[GuidancePass, ...] = (COND,)
    mode: str = "split"
    enabled: AV = BOTH


CASES = {
    "even": Case(),
    "one noise level": Case(kept=False),
    "uneven": Case(clip=ClipShape(17, 96, 96, 24.0)),
    "fewer tokens than ranks": Case(clip=ClipShape(17, 32, 32, 24.0), kept=False),
    "an empty share": Case(clip=ClipShape(33, 32, 32, 24.0), batch=2),
    "conditioning tokens": Case(appended=5),
    "user masks": Case(appended=3, weighted=True, batch=2),
    "user masks, even": Case(weighted=True),
    "odd sound": Case(audio=7),
    "one sound token": Case(audio=1, appended=1),
    "2.0": Case(label="2.0", appended=5, passes=ALL_PASSES),
    "2.5": Case(label="2.5", appended=5),
    "split passes": Case(appended=5, passes=ALL_PASSES),
    "STG in part of the batch": Case(appended=5, passes=ALL_PASSES, mode="batched"),
    "STG in all of the batch": Case(appended=5, passes=(PERTURBED,), mode="batched", batch=2),
    "picture skipped": Case(appended=5, enabled=AV(False, True)),
    "sound skipped": Case(appended=5, enabled=AV(True, False)),
}

# tokens, samples, heads of the bias
ATTENTIONS = {
    "even": (24, 1, 0),
    "uneven": (23, 2, 0),
    "weighted": (24, 1, 1),
    "uneven, weighted": (23, 2, 1),
    "weighted by head": (23, 2, HEADS),
    "an empty share": (5, 1, 0),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def drawing(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# attention ------------------------------------------------------------------------------------------------------------


def attention_among(name, dtype, context):
    """Self attention of all tokens, and none of its linear layers."""
    count, batch, bias_heads = ATTENTIONS[name]
    draw = drawing(3, DTYPES[dtype])
    q, k, v = (draw(batch, count, HEADS * HEAD_DIM) for _ in range(3))
    bias = draw(batch, bias_heads, count, count) if bias_heads else None
    split = Split(context, count) if context.size > 1 else WHOLE
    return split.gather(attend_among(*(split.take(x, 1) for x in (q, k, v)), HEADS, bias, split))


def attention_given(name, dtype, context):
    """Attention of replicated queries to keys that are split."""
    count, batch, _ = ATTENTIONS[name]
    draw = drawing(4, DTYPES[dtype])
    q, k, v = draw(batch, 7, HEADS * HEAD_DIM), *(draw(batch, count, HEADS * HEAD_DIM) for _ in range(2))
    if context.size == 1:
        return attend_given(q, KeysValues(k, v), HEADS)
    split = Split(context, count)
    return attend_given(q, SplitKeysValues(split.take(k, 1), split.take(v, 1), split, None), HEADS)


def attentions(context):
    results = {}
    for name in ATTENTIONS:
        for dtype in DTYPES:
            results[f"among/{name}/{dtype}"] = attention_among(name, dtype, context)
            for mode in ("heads", "partial"):
                results[f"given/{mode}/{name}/{dtype}"] = attention_given(name, dtype, replace(context, v2a=mode))
    return results


# models ---------------------------------------------------------------------------------------------------------------


def model_of(label, dtype=torch.float32):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.from_config(tiny_config(label)))
    for name, parameter in model.named_parameters():
        near_one = name.endswith(("q_norm.weight", "k_norm.weight"))
        parameter.data = torch.randn(parameter.shape) * 0.15 + near_one
    return model.to(dtype).requires_grad_(False)


def setting(case, config, dtype=torch.float32):
    """States, the two prompts, and noisy tokens."""
    draw, streams = drawing(1, dtype), config.streams
    video = tokens.video_state(draw(case.batch, streams.video.in_channels, *case.clip.grid), case.clip)
    audio = tokens.audio_state(draw(case.batch, 2, case.audio, streams.audio.in_channels // 2))
    if case.kept:
        video = video.write(draw(case.batch, 3, streams.video.in_channels), 0, 0.7)
    if case.appended:
        positions = draw(1, 3, case.appended, 2).abs().float() * 20
        video = video.append(draw(1, case.appended, streams.video.in_channels), positions, 0.9)
    if case.weighted:
        count = video.latent.shape[1]
        weights = torch.rand(case.batch, count, count, generator=torch.Generator().manual_seed(2))
        # some tokens do not see each other at all
        video = replace(video, attention_mask=(weights * (weights > 0.3)).to(dtype))
    widths = streams.map(lambda own: config.caption_channels or own.context_dim)
    prompts = [widths.map(lambda width: draw(1, 6, width)) for _ in range(2)]
    states = AV(video, audio)
    return states, prompts, states.map(lambda state: draw(*state.latent.shape))


def evaluate(model, case, context=SINGLE):
    states, prompts, x = setting(case, model.config, model.video.patchify_proj.weight.dtype)
    run = EVALUATIONS[case.mode](model, states, case.passes, *prompts, lambda: None, parallel=context)
    return run(x, 0.7, case.enabled)


def gathering():
    """Inside the block, tables of all tokens are gathered from those of the ranks in every block, twice a block."""
    across = Attention.keys_values_across

    def gathered(self, given, rotary, split):
        if split.size == 1:
            return across(self, given, rotary, split)

        def gather(table):
            heads = table.shape[1]
            return split.gather(table.transpose(1, 2).flatten(2)).unflatten(2, (heads, -1)).transpose(1, 2)

        full = Rotary(gather(rotary.local.cos), gather(rotary.local.sin))
        return across(self, given, CrossRotary(rotary.local, full), split)

    return mock.patch.object(Attention, "keys_values_across", gathered)


def build(name, context):
    """How the model is built: a context manager, and the context that the model is given."""
    late = name == GATHERED
    return gathering() if late else contextlib.nullcontext(), replace(context, v2a="heads_late" if late else name)


def builds_of(name, size):
    if size == 1:
        return ("partial",)
    return "partial", *(ROTATIONS if name in ROTATED else ROTATIONS[:1])


def evaluations(context):
    models = {label: model_of(label) for label in {case.label for case in CASES.values()}}
    results = {}
    for name, case in CASES.items():
        for how in builds_of(name, context.size):
            patched, own = build(how, context)
            with patched:
                velocities = evaluate(models[case.label], case, own)
            for one, velocity in zip(case.passes, velocities, strict=True):
                results |= {f"{name}/{how}/{one.name}/video": velocity.video}
                results |= {f"{name}/{how}/{one.name}/audio": velocity.audio}
    return results


# guidance over groups of ranks -----------------------------------------------------------------------------------------

# number of passes -> strengths that need so many
STRENGTHS = {
    1: StreamGuidance(),
    2: StreamGuidance(cfg=3.0),
    3: StreamGuidance(cfg=3.0, stg=1.0, stg_blocks=(1,)),
    4: StreamGuidance(cfg=3.0, stg=1.0, stg_blocks=(1,), modality=3.0, rescale=0.7),
}
GUIDED = Case(appended=5)


def guided(context=SINGLE, groups=ONE_GROUP):
    """The guided estimate of the clean tokens, by number of passes and stream."""
    model = model_of("2.3")
    states, prompts, x = setting(GUIDED, model.config)
    results = {}
    for count, strength in STRENGTHS.items():
        guidance = AV(strength, strength)
        passes = plan_passes(guidance)
        assert len(passes) == count
        run = grouped_evaluate(model, states, passes, *prompts, lambda: None, parallel=context, groups=groups)
        x0 = Denoiser(run, states, passes, guidance)(x, 0.7, step=0)
        results |= {f"{count} passes/video": x0.video, f"{count} passes/audio": x0.audio}
    return results
