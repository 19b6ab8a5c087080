"""Checkpoints: Hugging Face safetensors and orbax, role by role, and the demo model."""
