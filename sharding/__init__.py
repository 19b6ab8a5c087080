"""Where arrays live and how they move: meshes, placement, the exchange."""
