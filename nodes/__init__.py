"""The node table. Importing it needs the standard library only."""

from .bridge import LTX2ContextFromNative, LTX2LatentFromNative, LTX2LatentToNative
from .condition import LTX2FirstLastFrame, LTX2ImageCondition, LTX2Keyframe, LTX2ReferenceVideo
from .decode import LTX2Decode, LTX2DecodeAudio
from .edit import LTX2ExtendVideo, LTX2Inpaint, LTX2Retake
from .guide import LTX2Guider
from .host import install
from .latent import LTX2EmptyLatent
from .load import LTX2LoadModel
from .lora import LTX2LoadLora
from .prompt import LTX2EncodePrompt, LTX2EnhancePrompt
from .sample import LTX2Sampler, LTX2SelectSampler, LTX2Sigmas
from .sound import LTX2KeepAudio, LTX2ReferenceAudio
from .upscale import LTX2JoinStreams, LTX2UpscaleLatent

# a literal table: registries find nodes by reading it
NODE_CLASS_MAPPINGS = {
    "LTX2LoadModel": LTX2LoadModel,
    "LTX2EncodePrompt": LTX2EncodePrompt,
    "LTX2EmptyLatent": LTX2EmptyLatent,
    "LTX2ImageCondition": LTX2ImageCondition,
    "LTX2Guider": LTX2Guider,
    "LTX2Sigmas": LTX2Sigmas,
    "LTX2SelectSampler": LTX2SelectSampler,
    "LTX2Sampler": LTX2Sampler,
    "LTX2Decode": LTX2Decode,
    "LTX2ContextFromNative": LTX2ContextFromNative,
    "LTX2LatentFromNative": LTX2LatentFromNative,
    "LTX2LatentToNative": LTX2LatentToNative,
    "LTX2LoadLora": LTX2LoadLora,
    "LTX2Keyframe": LTX2Keyframe,
    "LTX2FirstLastFrame": LTX2FirstLastFrame,
    "LTX2ReferenceVideo": LTX2ReferenceVideo,
    "LTX2ExtendVideo": LTX2ExtendVideo,
    "LTX2Retake": LTX2Retake,
    "LTX2Inpaint": LTX2Inpaint,
    "LTX2KeepAudio": LTX2KeepAudio,
    "LTX2ReferenceAudio": LTX2ReferenceAudio,
    "LTX2UpscaleLatent": LTX2UpscaleLatent,
    "LTX2JoinStreams": LTX2JoinStreams,
    "LTX2DecodeAudio": LTX2DecodeAudio,
    "LTX2EnhancePrompt": LTX2EnhancePrompt,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "LTX2LoadModel": "LTX-2 Load Model",
    "LTX2EncodePrompt": "LTX-2 Encode Prompt",
    "LTX2EmptyLatent": "LTX-2 Empty Latent",
    "LTX2ImageCondition": "LTX-2 First Image",
    "LTX2Guider": "LTX-2 Guider",
    "LTX2Sigmas": "LTX-2 Sigmas",
    "LTX2SelectSampler": "LTX-2 Select Sampler",
    "LTX2Sampler": "LTX-2 Sampler",
    "LTX2Decode": "LTX-2 Decode",
    "LTX2ContextFromNative": "LTX-2 Context from Conditioning",
    "LTX2LatentFromNative": "LTX-2 Latent from LATENT",
    "LTX2LatentToNative": "LTX-2 Latent to LATENT",
    "LTX2LoadLora": "LTX-2 Load LoRA",
    "LTX2Keyframe": "LTX-2 Keyframe",
    "LTX2FirstLastFrame": "LTX-2 First and Last Frame",
    "LTX2ReferenceVideo": "LTX-2 Reference Video",
    "LTX2ExtendVideo": "LTX-2 Extend Video",
    "LTX2Retake": "LTX-2 Retake",
    "LTX2Inpaint": "LTX-2 Inpaint",
    "LTX2KeepAudio": "LTX-2 Keep Audio",
    "LTX2ReferenceAudio": "LTX-2 Reference Audio",
    "LTX2UpscaleLatent": "LTX-2 Upscale Latent",
    "LTX2JoinStreams": "LTX-2 Join Streams",
    "LTX2DecodeAudio": "LTX-2 Decode Audio",
    "LTX2EnhancePrompt": "LTX-2 Enhance Prompt",
}

install()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
