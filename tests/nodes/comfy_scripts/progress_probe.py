"""A pack of one node that reports progress through the host, as the engine's nodes do."""

import time


class HostTestProgress:
    """Steps through a progress display and gives back how many there were."""

    RETURN_TYPES = ("INT",)
    FUNCTION = "execute"
    CATEGORY = "testing"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"steps": ("INT", {"default": 4})}, "hidden": {"node_id": "UNIQUE_ID"}}

    @classmethod
    def execute(cls, steps: int, node_id: str | None = None) -> dict:
        import torch
        from ltx2_engine.ltx2_core.host import host

        with host().progress(steps, "test", node_id) as bar:
            for _ in range(steps):
                time.sleep(0.11)
                bar.step()
        said = [host().name, str(torch.is_inference_mode_enabled()), str(sorted(host().save_metadata() or ()))]
        return {"ui": {"text": said}, "result": (steps,)}


NODE_CLASS_MAPPINGS = {"HostTestProgress": HostTestProgress}
