"""What Gemma 3 sees: the vision tower that some text encoder files bring, from their headers to tokens of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..loading.checkpoint import Checkpoint
from ..loading.weights import Weight, weights_of
from .encoder_config import GEMMA3, Config, GemmaError, family
from .encoder_files import GGUF, TextEncoderFiles

# names in files on the hub, in transformers' own module tree, and in single files for ComfyUI -> in the module
_PREFIXES = {
    "vision_tower.vision_model.": "tower.",
    "vision_tower.": "tower.",
    "model.vision_tower.vision_model.": "tower.",
    "model.vision_tower.": "tower.",
    "vision_model.": "tower.",
    "multi_modal_projector.": "projector.",
    "model.multi_modal_projector.": "projector.",
}
# what no tensor tells, as Gemma 3 was released: the heads, and how many patches one token stands for along each side
_HEADS, _POOL = 16, 4
_PATCHES = "tower.embeddings.patch_embedding.weight"
_POSITIONS = "tower.embeddings.position_embedding.weight"
_INNER = "tower.encoder.layers.0.mlp.fc1.weight"
_PROJECTION = "projector.mm_input_projection_weight"
_SHOWN = 5

WHAT_SEES = (
    "Gemma 3 12B's Hugging Face folder, or a single file for ComfyUI that holds vision_model (such as "
    "gemma_3_12B_it.safetensors)"
)


@dataclass(frozen=True, eq=False)
class VisionFiles:
    """The vision tower in a text encoder's files; no weights.

    config: of the tower. pool: patches that one token stands for, along each side. width: of the tokens. weights: all that
    fills the module: the file, the weight, its name in the module.
    """

    config: Config
    pool: int
    width: int
    weights: tuple[tuple[Checkpoint, Weight, str], ...]


def read_vision(files: TextEncoderFiles) -> VisionFiles:
    """The vision tower of a text encoder. Raises GemmaError where it has none, saying which files have one."""
    if family(files.config) != GEMMA3:
        raise GemmaError(f"{files.path.name}: pictures are seen by Gemma 3 only; this is {files.version}")
    weights = tuple(
        (file, weight, ours)
        for file in files.weights
        for name, weight in weights_of(file).items()
        if (ours := _module_name(name)) is not None
    )
    shapes = {name: weight.shape for _, weight, name in weights}
    missing = [name for name in (_PATCHES, _POSITIONS, _INNER, _PROJECTION) if name not in shapes]
    if missing:
        kept = " (GGUF keeps it in a file of its own, mmproj, which is not read)" if files.kind == GGUF else ""
        raise GemmaError(
            f"{files.path.name} cannot see pictures: it has no vision tower{kept}. Choose a text encoder that does, which "
            f"is {WHAT_SEES}, or leave the image away: the prompt alone can be enhanced"
        )
    config = {**_told_by(shapes), **files.config.get("vision_config", {})}
    vision = VisionFiles(config, _pool(files.config, config), shapes[_PROJECTION][-1], weights)
    _check(files, vision, shapes)
    return vision


def _module_name(name: str) -> str | None:
    """The name in ``VisionEncoder``; None for what it does not need."""
    for prefix, ours in _PREFIXES.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            # what pools a picture into one vector, and Gemma has tokens
            return None if rest.startswith("head.") else ours + rest
    return None


def _told_by(shapes: Mapping[str, tuple[int, ...]]) -> Config:
    """The configuration of a file that carries none."""
    width, channels, patch = (*shapes[_PATCHES], 0, 0)[:3]
    layers = {name.split(".")[3] for name in shapes if name.startswith("tower.encoder.layers.")}
    return {
        "num_attention_heads": _HEADS,
        "hidden_size": width,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * round(shapes[_POSITIONS][0] ** 0.5),
        "num_hidden_layers": len(layers),
        "intermediate_size": shapes[_INNER][0],
    }


def _pool(config: Config, vision: Config) -> int:
    tokens = config.get("mm_tokens_per_image")
    return _POOL if tokens is None else vision["image_size"] // vision["patch_size"] // math.isqrt(tokens)


def _check(files: TextEncoderFiles, vision: VisionFiles, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise GemmaError unless the files hold every tensor of the module in its shape, and no other."""
    with torch.device("meta"):
        needed = {name: tuple(tensor.shape) for name, tensor in build_vision(vision).state_dict().items()}
    wrong = [f"{name} {list(shape)} is missing" for name, shape in needed.items() if name not in shapes]
    wrong += [f"{name} {list(shape)} is unexpected" for name, shape in shapes.items() if needed.get(name) != shape]
    if wrong or vision.width != files.width:
        raise GemmaError(
            f"{files.path.name}: its vision tower is not that of a Gemma 3 of width {files.width}: its tokens have "
            f"{vision.width}; {'; '.join(wrong[:_SHOWN]) or 'all else is right'}. Use {WHAT_SEES}"
        )


# the module -----------------------------------------------------------------------------------------------------------


class VisionEncoder(nn.Module):
    """Pictures to tokens that stand among those of a text: a SigLIP tower of transformers, pooled and projected."""

    def __init__(self, config: Config, pool: int, width: int) -> None:
        super().__init__()
        from transformers import SiglipVisionConfig, SiglipVisionModel

        tower = SiglipVisionModel(SiglipVisionConfig(**{**config, "vision_use_head": False}))
        # some versions of transformers have one level more
        self.tower: Any = getattr(tower, "vision_model", tower)
        self.size: int = config["image_size"]
        self.projector = _Projector(config["hidden_size"], width, self.size // config["patch_size"], pool)

    def forward(self, picture: Tensor) -> Tensor:
        """picture: [H, W, 3] in 0..1, of any size. Returns its tokens [N, width] in the weights' dtype."""
        weight = self.projector.mm_input_projection_weight
        pixels = picture.to(weight.device, torch.float32).clamp(0, 1).movedim(-1, 0).unsqueeze(0)
        # the shape is not kept, as in training
        pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        states = self.tower(pixel_values=(pixels * 2 - 1).to(weight.dtype)).last_hidden_state
        return self.projector(states)[0]


class _Projector(nn.Module):
    def __init__(self, seen: int, width: int, patches: int, pool: int) -> None:
        super().__init__()
        self.patches, self.pool = patches, pool
        self.mm_input_projection_weight = nn.Parameter(torch.empty(seen, width))
        self.mm_soft_emb_norm = _Norm(seen)

    def forward(self, states: Tensor) -> Tensor:
        """states: [1, patches ** 2, seen]. Returns [1, N, width]."""
        grid = states.mT.unflatten(2, (self.patches, self.patches))
        pooled = F.avg_pool2d(grid, self.pool).flatten(2).mT
        return self.mm_soft_emb_norm(pooled) @ self.mm_input_projection_weight


class _Norm(nn.Module):
    """Gemma's: the weight is stored without the 1 that is added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (normed * (1 + self.weight.float())).to(x.dtype)


def build_vision(files: VisionFiles) -> VisionEncoder:
    """The module that the files fill; under ``torch.device("meta")`` it takes no memory. Raises GemmaError."""
    try:
        return VisionEncoder(files.config, files.pool, files.width).train(False).requires_grad_(False)
    # the library's own checks of a configuration raise errors of many kinds
    except Exception as error:
        raise GemmaError(
            f"transformers does not take the vision_config of the text encoder: {str(error)[:300]}"
        ) from error


def fill_vision_buffers(model: VisionEncoder, device: torch.device) -> None:
    """Give a model that was built on the meta device its computed buffers."""
    embeddings = model.tower.embeddings
    positions = torch.arange(embeddings.num_positions, device=device).expand((1, -1))
    embeddings.register_buffer("position_ids", positions, persistent=False)
