"""Which release of LTX-2 a checkpoint is: from its ``model_version``, or from its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

TRANSFORMER_PREFIX = "model.diffusion_model."

_FAMILY_MARK = "audio_adaln_single.linear.weight"

_LORA_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora.down.", ".lora.up.", ".hada_w1_", ".lokr_w1")
_LORA_ENDS = (".diff", ".diff_b", ".set_weight")

# (any of these names starts a tensor's name, what the file then is), most telling first
_LOOKS = (
    (
        ("audio_time_embed.", "audio_proj_in.", "transformer.audio_time_embed."),
        "an LTX-2 transformer with diffusers names",
    ),
    (("adaln_single.", "transformer_blocks."), "an LTX-Video 0.9.x transformer (video without sound)"),
    (("model.embed_tokens.", "language_model.", "model.language_model."), "a Gemma text encoder"),
    (
        ("vae.encoder.", "vae.decoder.", "encoder.down_blocks.", "decoder.up_blocks.", "decoder.conv_in_x_t."),
        "a video VAE",
    ),
    (("audio_vae.", "vocoder."), "an audio VAE with its vocoder"),
    (("text_embedding_projection.", "video_embeddings_connector."), "text projections without a transformer"),
    (("upsampler.", "post_upsample_res_blocks."), "a latent upsampler"),
    (("duration_head.",), "a duration head"),
)


class VersionError(ValueError):
    """A file is not an LTX-2 checkpoint, or of a release that cannot be told."""


@dataclass(frozen=True)
class ModelVersion:
    """A release of LTX-2, as whole numbers: (2, 3, 0)."""

    numbers: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> ModelVersion | None:
        """Leading whole numbers of a dotted version, ``-`` read like ``.``: "2.4-rc2" is 2.4; None when there are none."""
        numbers: list[int] = []
        for part in text.strip().replace("-", ".").split(".")[:8]:
            if not (part.isascii() and part.isdigit() and len(part) <= 6):
                break
            numbers.append(int(part))
        return cls(tuple(numbers)) if numbers else None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ModelVersion | None:
        """The version that a file's metadata states; None when it states none that can be read."""
        return cls.parse(metadata.get("model_version", ""))

    @property
    def label(self) -> str:
        """Major and minor number, as releases are called: "2.0", "2.3", "2.5"."""
        major, minor = (*self.numbers, 0)[:2]
        return f"{major}.{minor}"

    def at_least(self, *numbers: int) -> bool:
        """Whether this is version ``numbers`` or a later one; absent numbers count as 0, so 2.4 is at least 2.4.0."""
        length = max(len(self.numbers), len(numbers))
        padded = [v + (0,) * (length - len(v)) for v in (self.numbers, numbers)]
        return padded[0] >= padded[1]

    def __str__(self) -> str:
        return ".".join(str(n) for n in self.numbers)


def recognise(metadata: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> ModelVersion:
    """The release that a checkpoint belongs to: from ``model_version``, else from the transformer's tensors.

    shapes: checkpoint name -> shape, with or without the transformer's prefix.
    Raises VersionError, saying what the file looks like, for anything but a file of an LTX-2 audio-video model.
    """
    stated = ModelVersion.from_metadata(metadata)
    if not is_lora(shapes):
        if stated is not None and stated.at_least(2):
            return stated
        bare = _bare(shapes)
        if stated is None and _FAMILY_MARK in bare:
            return _transformer_release(bare)
    raise VersionError(f"the file is not an LTX-2 checkpoint: it looks like {looks_like(metadata, shapes)}")


def looks_like(metadata: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> str:
    """A phrase for messages: "an LTX-2 checkpoint of version 2.3", "a LoRA ...", "a Gemma text encoder", ..."""
    if not shapes:
        return "an empty file"
    if is_lora(shapes):
        return "a LoRA (weight differences, to be added to a model)"
    bare = _bare(shapes)
    stated = ModelVersion.from_metadata(metadata)
    if _FAMILY_MARK in bare:
        try:
            return f"an LTX-2 checkpoint of version {(stated or _transformer_release(bare)).label}"
        except VersionError:
            return "an LTX-2 transformer of no released version"
    release = f" of LTX {stated}" if stated else ""
    for starts, phrase in _LOOKS:
        if any(name.startswith(starts) for name in bare):
            return phrase + release
    return f"an unknown kind of model{release} with tensors such as {', '.join(repr(n[:80]) for n in list(bare)[:3])}"


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors of these names are changes of weights rather than weights."""
    return any(name.endswith(_LORA_ENDS) or any(mark in name for mark in _LORA_MARKS) for name in names)


def layout(metadata: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The label of the released configuration that fits a file's tensors; None when none is known to.

    Other than ``recognise`` it also knows files that hold a convolutional video VAE, an audio VAE or a text projection
    alone. Releases 2.3 and 2.5 share those layouts, so "2.3" may stand for either.
    """
    if is_lora(shapes):
        return None
    if _FAMILY_MARK in _bare(shapes):
        return recognise(metadata, shapes).label
    bare = {name.removeprefix("vae."): tuple(shape) for name, shape in shapes.items()}
    if "decoder.conv_in_x_t.weight" in bare:
        return None
    if "vocoder.vocoder.resblocks.0.convs1.0.weight" in bare:
        return "2.3"
    if "vocoder.resblocks.0.convs1.0.weight" in bare:
        return "2.0"
    deepest = bare.get("encoder.down_blocks.8.res_blocks.0.conv1.conv.weight")
    if deepest:
        return {2048: "2.0", 1024: "2.3"}.get(deepest[0])
    if "text_embedding_projection.video_aggregate_embed.weight" in bare:
        return "2.3"
    return "2.0" if "text_embedding_projection.aggregate_embed.weight" in bare else None


def _bare(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(TRANSFORMER_PREFIX): tuple(shape) for name, shape in shapes.items()}


def _transformer_release(bare: Mapping[str, tuple[int, ...]]) -> ModelVersion:
    block = "transformer_blocks.0."
    table = bare.get(block + "scale_shift_table", ())
    rows = table[0] if table else 0
    gated = block + "attn1.to_gate_logits.weight" in bare
    caption_projection = "caption_projection.linear_1.weight" in bare
    if rows == 6 and not gated and caption_projection:
        return ModelVersion((2, 0))
    if rows == 9 and gated and not caption_projection:
        without_bias = block + "ff.net.0.proj.bias" not in bare
        newest = without_bias or "keyframes_abs_pos_embedding" in bare
        return ModelVersion((2, 5) if newest else (2, 3))
    raise VersionError(
        f"the transformer is of no released version: block 0 has a modulation table of {rows} rows "
        f"(2.0: 6; 2.3 and 2.5: 9), gates {'present' if gated else 'absent'}, caption projection "
        f"{'present' if caption_projection else 'absent'} (2.0: absent and present; 2.3 and 2.5: present and absent)"
    )
