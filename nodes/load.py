"""Loading a model."""

from __future__ import annotations

from ..ltx2_core.config.numerics import NUMERICS
from ..ltx2_core.host import host
from ..ltx2_core.model_spec import DTYPES, MAX_RANKS, TOPOLOGIES, ModelSpec, rank_devices
from . import links
from .fields import COMBO, FLOAT, INT

FROM_CHECKPOINT = "from the checkpoint"

# input -> the model folders whose files it offers
_CHECKPOINT = ("checkpoints", "diffusion_models")
_VAE = ("vae", "checkpoints")
_TEXT_PROJECTION = ("text_encoders", "checkpoints")


class LTX2LoadModel:
    """Names the files of a model, checks that they belong together and begins to read them in the background."""

    CATEGORY = "LTX-2 Engine/loading"
    DESCRIPTION = (
        "Opens an LTX-2 model: one full checkpoint, or a transformer file with files of its VAEs and text projection, and a "
        "text encoder. Headers are checked at once, all together; weights are read in the background from then on."
    )
    SEARCH_ALIASES = ["ltx", "ltxv", "checkpoint", "load ltx-2", "diffusion model", "unet", "gguf"]
    FUNCTION = "execute"
    RETURN_TYPES = (links.MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("The model: transformer, text encoder, VAEs and vocoder in one handle.",)

    @classmethod
    def INPUT_TYPES(cls):
        vaes = [FROM_CHECKPOINT, *_listed(_VAE)]
        return {
            "required": {
                "checkpoint": COMBO(
                    _listed(_CHECKPOINT),
                    "The full LTX-2 checkpoint in models/checkpoints, or a transformer file in models/diffusion_models "
                    "(then choose the VAEs and the text projection below).",
                ),
                "text_encoder": COMBO(
                    host().list_text_encoders(),
                    "The text encoder in models/text_encoders: Gemma 3 as a folder, a single file or a GGUF file, or the Gemma "
                    "4 file of LTX-2.5.",
                ),
            },
            "optional": {
                "dtype": COMBO(
                    DTYPES,
                    "Precision of the weights. auto is bfloat16 on a GPU and float32 on the CPU; float32 takes twice the "
                    "memory of bfloat16.",
                    advanced=True,
                ),
                "device": COMBO(
                    ["auto", *host().compute_devices()],
                    "Where the model runs. auto is the host's choice, usually the first GPU.",
                    advanced=True,
                ),
                "video_vae": COMBO(
                    vaes,
                    "The file of the video VAE, in models/vae, for a checkpoint that holds none. A full checkpoint's VAE can "
                    "be taken too.",
                    advanced=True,
                ),
                "audio_vae": COMBO(
                    vaes,
                    "The file of the audio VAE and vocoder, in models/vae, for a checkpoint that holds none. Those of a full "
                    "checkpoint can be taken too.",
                    advanced=True,
                ),
                "text_projection": COMBO(
                    [FROM_CHECKPOINT, *_listed(_TEXT_PROJECTION)],
                    "The file of the text projection, in models/text_encoders, for a checkpoint that holds none; that of a "
                    "full checkpoint can be taken too. A text encoder file of LTX-2.5 brings its own.",
                    advanced=True,
                ),
                "memory_limit": FLOAT(
                    0.0,
                    0.0,
                    1024.0,
                    "The most GiB of the device that the model may take, weights and work together. 0 takes what the host "
                    "has free. What does not fit is streamed from main memory.",
                    step=0.5,
                    advanced=True,
                ),
                "numerics": COMBO(
                    NUMERICS,
                    "How exactly the transformer computes. exact rounds where the reference does. fast rounds less often, in "
                    "the same precision: as good, but not the same bits. fp8 is fast, with the large matrix products in "
                    "eight bits: bfloat16 weights take half the memory and steps are shorter, but every product is off by "
                    "some percent, so details of the clip change and fine texture may suffer. fp8 needs dtype bfloat16, and "
                    "an NVIDIA GPU from RTX 40 or H100 on (compute capability 8.9) to be quicker.",
                    advanced=True,
                ),
                "gpus": INT(
                    1,
                    1,
                    MAX_RANKS,
                    "How many GPUs make one clip together: 1, 2, 4 or 8, from the device above on (auto: from the first). Each "
                    "holds the whole transformer. With device cpu, as many processes share the CPU, which is for trying out.",
                    advanced=True,
                ),
                "topology": COMBO(
                    TOPOLOGIES,
                    "How several GPUs share the passes of guided sampling: 2x4 is two groups of four GPUs, each group with "
                    "passes of its own. auto chooses the quickest by size and measured speed of the connection, and the log "
                    "says why.",
                    advanced=True,
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, **inputs):
        return str(_spec(**inputs))

    @classmethod
    def execute(cls, **inputs):
        from ..ltx2_core.handles import ModelHandle, open_engine

        spec = _spec(**inputs)
        # the node is done while its threads read, and prompts are encoded meanwhile
        return (ModelHandle(spec, open_engine(spec)).start(),)


def _spec(
    checkpoint,
    text_encoder,
    dtype="auto",
    device="auto",
    video_vae=FROM_CHECKPOINT,
    audio_vae=FROM_CHECKPOINT,
    text_projection=FROM_CHECKPOINT,
    memory_limit=0.0,
    numerics="exact",
    gpus=1,
    topology="auto",
):
    """What the node's inputs stand for; their defaults are here."""
    spec = ModelSpec.of(
        _resolved(_CHECKPOINT, checkpoint),
        host().resolve_text_encoder(text_encoder),
        dtype=dtype,
        device=_device(device, gpus),
        video_vae=_component(_VAE, video_vae),
        audio_vae=_component(_VAE, audio_vae),
        text_projection=_component(_TEXT_PROJECTION, text_projection),
        limit_gib=memory_limit,
        numerics=numerics,
        ranks=gpus,
        topology=topology,
    )
    # they are all there
    rank_devices(spec.device, spec.ranks, host().compute_devices())
    return spec


def _device(device, gpus):
    """The device, or the first of several."""
    if device != "auto" or gpus == 1:
        return host().default_device() if device == "auto" else device
    present = host().compute_devices()
    if present[0] == "cpu":
        raise ValueError(
            f"{gpus} GPUs were asked for; this machine has {', '.join(present)}: set gpus to 1, or device to cpu to have "
            f"{gpus} processes share the CPU"
        )
    return present[0]


def _listed(kinds):
    """Names of the files of several model folders; a name that stands in two of them means the first."""
    shards = {f"{folder}/" for folder in host().list_text_encoders()}
    names = [name for kind in kinds for name in host().list_models(kind)]
    return list(dict.fromkeys(name for name in names if not any(name.startswith(folder) for folder in shards)))


def _resolved(kinds, name):
    kind = next((kind for kind in kinds if name in host().list_models(kind)), kinds[0])
    return host().resolve_model(kind, name)


def _component(kinds, name):
    return None if name == FROM_CHECKPOINT else _resolved(kinds, name)
