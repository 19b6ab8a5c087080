"""The colocated pass: both roles on every device, layer by layer, with no other mesh to wait for."""

from collections.abc import Callable

import jax

from jmoe.decoder_layer import Chosen
from jmoe.role_programs import AttentionRole, ExpertRole, Lane, Pages
from jmoe.rows import Rows
from jmoe.schedule import Stage
from jmoe.sharding.shared_devices import SharedDevices


class Colocated:
    """Takes the two roles of one device through all layers: attention, router, experts, residual.

    Micro-batches go through a layer one after the other. On one device one is enough; on several a second lets XLA run
    a collective of one beside the compute of the other.

    Args:
      attention, expert: this device's roles.
      devices: how rows move between them.
      watch: gets what the router chose, layer by layer and micro-batch by micro-batch, while the pass is traced.
    """

    def __init__(
        self,
        attention: AttentionRole,
        expert: ExpertRole,
        devices: SharedDevices,
        watch: Callable[[Chosen], None] = lambda _: None,
    ):
        self.attention = attention
        self.expert = expert
        self.devices = devices
        self._watch = watch

    def walk(self, rows: list[Rows], pages: Pages) -> tuple[list[Lane], Pages]:
        """One pass of every micro-batch.

        Args:
          rows: by micro-batch.
          pages: by decoder layer.

        Returns:
          The residual behind the last layer by micro-batch, and the pages with the new tokens.
        """
        pages = list(pages)
        lanes: list[tuple[jax.Array, jax.Array | None]] = [(self.attention.embed(row), None) for row in rows]
        for layer in range(len(self.attention.cell.model.moe_layers) + 1):
            for i, row in enumerate(rows):
                lanes[i] = self._stage(Stage(layer, i), *lanes[i], pages, row)
        return [Lane(x, None) for x, _ in lanes], pages

    def _stage(self, stage: Stage, x: jax.Array, delta: jax.Array | None, pages: Pages, rows: Rows):
        """One layer of one micro-batch: the residual, and what the experts make, which the next stage adds to it.

        Its pages are put back into `pages`.
        """
        layers = self.attention.layers_of(stage)
        x, kv, chosen = self.attention.layers(stage, x, delta, [pages[layer] for layer in layers], rows)
        if self.attention.cell.mesh.num_micro_batches > 1:
            # The next micro-batch writes into the same pages: were that scheduled before this one's reads, XLA would
            # copy the cache.
            x, kv, chosen = jax.lax.optimization_barrier((x, kv, chosen))
        pages[layers.start : layers.stop] = kv
        if chosen is None:
            return x, None
        self._watch(chosen)
        sent = self.devices.dispatch(
            chosen.rows, chosen.topk_idx, chosen.topk_weights, rows.valid.reshape(-1), rows.positions.reshape(-1)
        )
        return x, self.devices.combine(self.expert.partial_sums(stage.layer, *sent), x.dtype)
