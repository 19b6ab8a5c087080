"""Weights in and out: Hugging Face safetensors and orbax, role by role."""
