"""Which deployment, how many GPUs of which kind, and what it will do. No JAX."""
