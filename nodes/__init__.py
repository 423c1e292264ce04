"""The node table. Importing it needs the standard library only."""

from .bridge import LTX2ContextFromNative, LTX2LatentFromNative, LTX2LatentToNative
from .condition import LTX2ImageCondition
from .decode import LTX2Decode
from .guide import LTX2Guider
from .host import install
from .latent import LTX2EmptyLatent
from .load import LTX2LoadModel
from .prompt import LTX2EncodePrompt
from .sample import LTX2Sampler, LTX2SelectSampler, LTX2Sigmas

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
}

install()

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
