"""Which releases of a model's parts go together, and what would fit where they do not."""

from __future__ import annotations

from .config.version import ModelVersion
from .file_kinds import AUDIO_VAE, CONNECTORS, PROJECTION, UPSAMPLER, VIDEO_VAE, VOCODER, Release

# parts that LTX-2.3 and 2.5 share, because their video latents are the same; of all others each release has its own
_OF_LATENT_SPACE = (VIDEO_VAE, UPSAMPLER)

_OLD, _NEW = "2.0", "2.3"
_CHECKPOINTS = {_OLD: "ltx-2-19b-*.safetensors", _NEW: "ltx-2.3-22b-*.safetensors"}
_UPSAMPLERS = {
    _OLD: "the one of LTX-2.0 (ltx-2-spatial-upscaler-*)",
    _NEW: "one of LTX-2.3 or 2.5 (ltx-2.3-spatial-upscaler-*, ltx-2.3-temporal-upscaler-*)",
}
_FILES = {
    VIDEO_VAE: "a video VAE file",
    AUDIO_VAE: "an audio VAE file with its vocoder",
    VOCODER: "an audio VAE file with its vocoder",
    PROJECTION: "a text projection file",
    CONNECTORS: "a transformer or text projection file with the connectors",
}
_FILES_2_5 = {
    VIDEO_VAE: "the convolutional video VAE file of LTX-2.5 (ltx-2.5-video-vae-conv-*), or one of LTX-2.3",
    AUDIO_VAE: "the audio VAE file of LTX-2.5 with its vocoder (ltx-2.5-audio-vae-*)",
    VOCODER: "the audio VAE file of LTX-2.5 with its vocoder (ltx-2.5-audio-vae-*)",
    PROJECTION: "the text encoder file of LTX-2.5, which holds the projection (gemma4-12b-with-proj-ltx-2.5-*)",
    CONNECTORS: "a transformer file of LTX-2.5 with the connectors",
}

WHOLE_MODEL = (
    f"a full checkpoint of LTX-2 ({', '.join(_CHECKPOINTS.values())}), or a transformer file with separate files for the "
    "rest"
)


def misfit(part: str, found: Release | None, model: ModelVersion) -> str | None:
    """Why a part of one release does not go with a transformer of another, and what would; None when it does.

    found: the part's release; None, where it is unknown, counts as fitting.
    """
    if found is None or _goes_with(part, found, model):
        return None
    owner = "its latents are" if part in _OF_LATENT_SPACE else "it is"
    return f"{owner} of {found}, but the transformer is of LTX-{model.label}: choose {what_fits(part, model)}"


def what_fits(part: str, model: ModelVersion) -> str:
    """The files that hold a part for a transformer of a version, for messages."""
    generation = latent_space(model)
    if part == UPSAMPLER:
        return _UPSAMPLERS.get(generation, f"one of LTX-{model.label}")
    if model.at_least(2, 4):
        return _FILES_2_5.get(part, "a file of LTX-2.5")
    releases = "2.3 or 2.5" if part in _OF_LATENT_SPACE and generation == _NEW else model.label
    checkpoint = f", or a full checkpoint ({_CHECKPOINTS[generation]})" if generation in _CHECKPOINTS else ""
    return f"{_FILES.get(part, 'a file')} of LTX-{releases}{checkpoint}"


def latent_space(version: ModelVersion) -> str:
    """Versions that share their video latents give the same."""
    if version.at_least(2, 3):
        return _NEW
    return _OLD if version.at_least(2) else version.label


def _goes_with(part: str, found: Release, model: ModelVersion) -> bool:
    if part in _OF_LATENT_SPACE or not found.certain:
        return latent_space(found.version) == latent_space(model)
    return found.version.label == model.label
