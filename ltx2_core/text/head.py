"""From the text encoder's hidden states to the contexts of the transformer."""

from __future__ import annotations

from torch import Tensor, nn

from ..av import AV
from ..config.text import TextConfig
from .connector import Connector
from .features import FeatureExtractorV1, FeatureExtractorV2


class TextHead(nn.Module):
    """Feature extractor and both connectors, which is all of the text path that belongs to LTX.

    num_hidden_states: how many states the text encoder yields, its layers and one.

    Checkpoint names: ``projection.`` here is ``text_embedding_projection.`` there, ``connectors.video.`` is
    ``model.diffusion_model.video_embeddings_connector.``, audio alike.
    """

    def __init__(self, config: TextConfig, num_hidden_states: int):
        super().__init__()
        self.projection = (
            FeatureExtractorV2(config.feature_dim, num_hidden_states, config.widths)
            if config.per_modality_projection
            else FeatureExtractorV1(config.feature_dim, num_hidden_states)
        )
        self.connectors = nn.ModuleDict(
            {"video": Connector(config.connectors.video), "audio": Connector(config.connectors.audio)}
        )

    def forward(self, states: Tensor, mask: Tensor) -> AV[Tensor]:
        """states: [B, S, D, L], the hidden states stacked last; mask: [B, S], True at tokens.

        Returns the contexts, [B, T, video width] and [B, T, audio width], T as in ``Connector``.
        """
        return self.connect(self.projection(states, mask), mask)

    def connect(self, features: AV[Tensor], mask: Tensor) -> AV[Tensor]:
        """Contexts from features [B, S, C] that were extracted elsewhere, for instance by ComfyUI."""
        connectors = AV(self.connectors["video"], self.connectors["audio"])
        return features.map(lambda x, connector: connector(x.to(connector.learnable_registers.dtype), mask), connectors)
