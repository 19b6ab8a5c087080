"""SharedDevices: how rows reach their experts where both roles stand on the same devices, and how sums come back.

One device keeps its rows: nothing moves and nothing is padded. Several replicas gather their rows on every device (one
hidden slice a tensor rank), each device adds up what its own experts make of them, and an all-to-all hands every
replica its tokens' partial sums. Both collectives run over the joint axis, are dropless, and move rows that a device
does not need: all of them to all devices, against the share 1 - (1 - 1/N)^k that uniform routing needs.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jmoe.sharding.mesh_config import AXIS, MeshConfig
from jmoe.sharding.routing import nodes_of
from jmoe.sharding.tensor_group import TensorGroup


@dataclasses.dataclass(frozen=True)
class SharedDevices:
    """Dispatch and combine of a colocated cell. Runs under `shard_map`, the same program on every device.

    Attributes:
      mesh: colocated and resolved.
      tensor: the attention replica's tensor ranks.
    """

    mesh: MeshConfig
    tensor: TensorGroup

    @classmethod
    def of(cls, mesh: MeshConfig, hidden_size: int) -> "SharedDevices":
        """For a mesh.

        Raises:
          ValueError: a hidden size that the tensor ranks can't share evenly.
        """
        if hidden_size % mesh.attention_tensor:
            raise ValueError(
                f"SharedDevices: expected hidden_size to be a multiple of {mesh.attention_tensor} "
                f"(attention_tensor), got {hidden_size}"
            )
        return cls(mesh, TensorGroup.of(mesh, "attention"))

    def dispatch(
        self, rows: jax.Array, topk_idx: jax.Array, topk_weights: jax.Array, valid: jax.Array, spread: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rows of all replicas, with this device's local ids of their experts.

        Args:
          rows: `[tokens, D]`, the same on each tensor rank of a replica.
          topk_idx, topk_weights: `[tokens, k]`; topk_idx is -1 for tokens that are not valid.
          valid: `[tokens]` bool; other tokens reach no expert.
          spread: `[tokens]` int32, which replica of an expert a token takes (see `route_rows`).

        Returns:
          rows `[M * tokens, D]`, local_idx `[M * tokens, k]` int32 with -1 for choices elsewhere, topk_weights
          `[M * tokens, k]`.
        """
        mesh = self.mesh
        assert mesh.placement is not None
        if mesh.expert == 1 and mesh.placement.is_in_order:
            place = topk_idx
        else:
            node, local = nodes_of(jnp.maximum(topk_idx, 0), spread, mesh.placement)
            place = jnp.where(valid[:, None], node * mesh.placement.max_local_experts + local, -1)
        if mesh.attention > 1:
            width = rows.shape[1] // self.tensor.size
            mine = jax.lax.dynamic_slice_in_dim(rows, self.tensor.rank() * width, width, 1)
            gathered = _by_replica(mine, mesh)  # [M, ranks, tokens, width]
            rows = jnp.moveaxis(gathered, 1, 2).reshape(-1, rows.shape[1])
            place, topk_weights = (_by_replica(a, mesh)[:, 0].reshape(-1, a.shape[1]) for a in (place, topk_weights))
        if mesh.expert > 1:
            here = jax.lax.axis_index(AXIS) // mesh.expert_tensor
            is_here = place // mesh.placement.max_local_experts == here  # -1 // n is -1: nowhere
            place = jnp.where(is_here, place % mesh.placement.max_local_experts, -1)
        return rows, place, topk_weights

    def combine(self, sums: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Partial sums of all replicas' rows, from every device, to each replica's own tokens.

        Args:
          sums: `[M * tokens, D]` float32, over this device's experts and columns.
          dtype: in which partial sums travel where there are several replicas (float32 where there is one).

        Returns:
          `[tokens, D]` float32, the devices' sums added in their order.
        """
        mesh, hidden = self.mesh, sums.shape[1]
        if mesh.num_devices == 1:
            return sums
        if mesh.attention == 1:
            return jax.lax.psum(sums, AXIS)
        slices = sums.astype(dtype).reshape(mesh.attention, -1, self.tensor.size, hidden // self.tensor.size)
        slices = jnp.moveaxis(slices, 2, 1).reshape(mesh.num_devices, -1, slices.shape[3])
        received = jax.lax.all_to_all(slices, AXIS, 0, 0)  # [devices, tokens, width], from each device
        total = jnp.sum(received.astype(jnp.float32), axis=0)
        return jnp.moveaxis(self.tensor.gather(total), 0, 1).reshape(total.shape[0], hidden)


def _by_replica(x: jax.Array, mesh: MeshConfig) -> jax.Array:
    """Every device's `[tokens, n]` as `[M, ranks, tokens, n]`."""
    return jax.lax.all_gather(x, AXIS).reshape(mesh.attention, mesh.attention_tensor, *x.shape)
