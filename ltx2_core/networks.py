"""The networks of a model by name, and how each is built from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .config.model import ModelConfig
from .text.head import TextHead
from .transformer.model import Transformer
from .vae.audio import AudioDecoder, AudioEncoder
from .vae.video_decoder import VideoDecoder
from .vae.video_encoder import VideoEncoder
from .vae.vocoder import Vocoder

# names as in loading.keymap.COMPONENTS
NETWORKS: Mapping[str, Callable[[ModelConfig], nn.Module]] = {
    "transformer": lambda config: Transformer(config.transformer),
    "text_head": lambda config: TextHead(config.text, config.num_hidden_states),
    "video_encoder": lambda config: VideoEncoder(config.video_vae),
    "video_decoder": lambda config: VideoDecoder(config.video_vae),
    "audio_encoder": lambda config: AudioEncoder(config.audio_vae),
    "audio_decoder": lambda config: AudioDecoder(config.audio_vae),
    "vocoder": lambda config: Vocoder(config.vocoder),
}

# The audio networks are small and audibly better in float32, whatever the model runs in (ltx-core 1.2).
FLOAT32_NETWORKS = frozenset({"audio_encoder", "audio_decoder", "vocoder"})


def build_on_meta(name: str, config: ModelConfig) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"), _WithoutValues():
        return NETWORKS[name](config)


class _WithoutValues(TorchFunctionMode):
    """Leaves out the initial values of new parameters, which take half of the time to make a module without memory."""

    _INITIAL = frozenset((torch.nn.init.kaiming_uniform_, torch.nn.init.uniform_))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._INITIAL:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
