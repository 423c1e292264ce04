"""Runs API-format workflows without a ComfyUI server: the same JSON, the same rules, the same error types."""
