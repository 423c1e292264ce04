"""All kinds of conditioning by name."""

from __future__ import annotations

from collections.abc import Mapping

from .audio import KeepAudio, ReferenceAudio, RetakeAudio
from .condition import Condition
from .extension import ExtendAudio, ExtendVideo
from .image import ImageCondition
from .keyframe import GeneratedKeyframes, KeyframeCondition
from .masks import InpaintVideo, KeepVideo, RetakeVideo
from .reference import ReferenceVideo
from .weighted import AttentionStrength

CONDITIONS: Mapping[str, type[Condition]] = {
    "image": ImageCondition,
    "keyframe": KeyframeCondition,
    "generated keyframes": GeneratedKeyframes,
    "reference video": ReferenceVideo,
    "attention strength": AttentionStrength,
    "extend video": ExtendVideo,
    "extend audio": ExtendAudio,
    "retake video": RetakeVideo,
    "retake audio": RetakeAudio,
    "inpaint video": InpaintVideo,
    "keep video": KeepVideo,
    "keep audio": KeepAudio,
    "reference audio": ReferenceAudio,
}
