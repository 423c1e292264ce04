"""Names and numbers that nodes offer: guidance presets, schedules, samplers, defaults by version. Torch-free.

Defaults per version: ltx-pipelines 1.2. Tests hold the names equal to the registries that implement them.
"""

from __future__ import annotations

from collections.abc import Mapping

from .config.version import ModelVersion

SAMPLERS = ("euler", "euler_ancestral", "res_2s", "gradient_estimation", "euler_cfg_pp")
NOISE_KINDS = ("normalised", "plain")
EVALUATIONS = ("auto", "split", "batched")
NOISE_LAYOUTS = ("ltx", "comfy")
SCHEDULES = ("distilled", "distilled stage 2", "ltx-2")
TILINGS = ("auto", "none", "temporal", "spatial")
# how several GPUs share the enhancement of a prompt
ENHANCE_TOPOLOGIES = ("auto", "single", "tensor", "helix")

DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
DISTILLED_STAGE_2_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)

_GUIDED = {
    "video_cfg": 3.0,
    "video_stg": 1.0,
    "video_modality": 3.0,
    "video_rescale": 0.7,
    "audio_cfg": 7.0,
    "audio_stg": 1.0,
    "audio_modality": 3.0,
    "audio_rescale": 0.7,
}

GUIDANCE_PRESETS: Mapping[str, Mapping[str, float | str]] = {
    "distilled": {
        **dict.fromkeys(("video_cfg", "video_modality", "audio_cfg", "audio_modality"), 1.0),
        **dict.fromkeys(("video_stg", "video_rescale", "audio_stg", "audio_rescale"), 0.0),
        "stg_blocks": "28",
        "evaluation": "auto",
    },
    "guided 2.0": {**_GUIDED, "stg_blocks": "29", "evaluation": "auto"},
    "guided 2.3/2.5": {**_GUIDED, "stg_blocks": "28", "evaluation": "auto"},
    "hq": {
        **_GUIDED,
        "video_stg": 0.0,
        "video_rescale": 0.45,
        "audio_stg": 0.0,
        "audio_rescale": 1.0,
        "stg_blocks": "",
        "evaluation": "split",
    },
}

# What choosing a sampler fills (ltx-pipelines 1.2); sde_seed -1 is the reference's fixed seed.
SAMPLER_PRESETS: Mapping[str, Mapping[str, float | int | str | bool]] = {
    "euler": {"eta": 0.0, "noise_kind": "plain", "sde_seed": -1, "follow_seed": False},
    "euler_ancestral": {"eta": 1.0, "noise_kind": "plain", "sde_seed": -1, "follow_seed": True},
    "res_2s": {"eta": 0.5, "noise_kind": "normalised", "sde_seed": -1, "follow_seed": False},
    "gradient_estimation": {"eta": 0.0, "noise_kind": "plain", "sde_seed": -1, "follow_seed": False},
    "euler_cfg_pp": {"eta": 1.0, "noise_kind": "plain", "sde_seed": -1, "follow_seed": False},
}


def default_image_crf(version: ModelVersion) -> int:
    """H.264 re-compression of conditioning images that the model was trained with."""
    return 18 if version.at_least(2, 4) else 33
