"""The LTX-2 core: model, loading, sampling, decoding. Plain PyTorch; runs without ComfyUI."""
