"""Link types of the pack: the name on the wire."""

MODEL = "LTX2_MODEL"  # ltx2_core.engine.ModelHandle
CONTEXT = "LTX2_CONTEXT"  # ltx2_core.engine.Context
GUIDER = "LTX2_GUIDER"  # ltx2_core.engine.Guider
SAMPLER = "LTX2_SAMPLER"  # ltx2_core.sampling.samplers.SamplerChoice
SIGMAS = "LTX2_SIGMAS"  # tuple of floats
LATENT = "LTX2_LATENT"  # ltx2_core.conditioning.latent.AVLatent
LORA = "LTX2_LORA"
