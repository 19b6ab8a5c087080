"""Routing: which rows a replica sends to which node, and how the partial sums find their tokens again."""

import dataclasses

import jax
import jax.numpy as jnp

from jmoe.sharding.placement import ExpertPlacement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
    """One micro-batch of one replica, cut by node. A token goes to a node at most once.

    Attributes:
      order: `[N, capacity]` int32, the tokens sent to each node, in token order; garbage from `num_rows` on.
      num_rows: `[N]` int32.
      position: `[N, tokens]` int32, where in its node's rows a token stands; -1 where it was not sent.
      local_idx: `[N, capacity, k]` int32, the node's local ids of the row's experts, -1 for choices elsewhere.
      topk_weights: `[N, capacity, k]` float32.
      num_dropped: int32, rows beyond the capacity.
    """

    order: jax.Array
    num_rows: jax.Array
    position: jax.Array
    local_idx: jax.Array
    topk_weights: jax.Array
    num_dropped: jax.Array


def rows_at(array: jax.Array, index: jax.Array) -> jax.Array:
    """array[index] for indices known to be in bounds: no code for negative or stray ones."""
    return array.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def nodes_of(topk_idx: jax.Array, spread: jax.Array, placement: ExpertPlacement) -> tuple[jax.Array, jax.Array]:
    """The node that computes each choice, and the expert's local id there: `[tokens, k]` int32 each.

    An expert with several replicas is taken from replica (spread mod replicas); see `route_rows`.
    """
    node_table, local_table, num_replicas = placement.tables()
    if placement.max_replicas == 1:
        node, local = (rows_at(jnp.asarray(t[:, 0]), topk_idx) for t in (node_table, local_table))
    else:
        replica = spread[:, None] % rows_at(jnp.asarray(num_replicas), topk_idx)
        flat = topk_idx * placement.max_replicas + replica
        node, local = (rows_at(jnp.asarray(t.reshape(-1)), flat) for t in (node_table, local_table))
    return node, local


def route_rows(
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    valid: jax.Array,
    spread: jax.Array,
    placement: ExpertPlacement,
    capacity: int,
) -> Routes:
    """Cuts a micro-batch's tokens by the nodes that hold their experts.

    An expert with several replicas is taken from replica (spread mod replicas): with the token's position as `spread`
    the choice depends on the token alone, not on its neighbours, and is balanced.

    Args:
      topk_idx, topk_weights: `[tokens, k]`.
      valid: `[tokens]` bool; other tokens are not sent.
      spread: `[tokens]` int32, not negative.
      placement: experts by node.
      capacity: rows that one node takes from this replica; tokens (never more are needed) is dropless.

    Returns:
      The routes.
    """
    node, local = nodes_of(topk_idx, spread, placement)
    nodes = jnp.arange(placement.num_nodes, dtype=jnp.int32)
    here = (node[None] == nodes[:, None, None]) & valid[None, :, None]  # [N, tokens, k]
    sent = here.any(axis=-1)
    up_to = jnp.cumsum(sent, axis=1, dtype=jnp.int32)
    wanted = up_to[:, -1]
    # The c-th row sent is the token before which c others were sent: a comparison, cheaper to compile than a sort.
    row = jnp.arange(capacity, dtype=jnp.int32)
    order = jnp.sum(up_to[:, None, :] <= row[:, None], axis=-1, dtype=jnp.int32)
    order = jnp.minimum(order, len(valid) - 1)  # [N, capacity]
    per_node = jnp.where(here, local[None], -1), jnp.where(here, topk_weights[None], 0.0)
    local_idx, weights = (jax.vmap(rows_at)(a, order) for a in per_node)
    return Routes(
        order=order,
        num_rows=jnp.minimum(wanted, capacity),
        position=jnp.where(sent & (up_to <= capacity), up_to - 1, -1),
        local_idx=local_idx,
        topk_weights=weights,
        num_dropped=jnp.sum(jnp.maximum(wanted - capacity, 0)),
    )


def sum_partials(partials: jax.Array, position: jax.Array) -> jax.Array:
    """Adds each token's partial sums, node by node in node order, so that arrival order can't matter.

    Args:
      partials: `[N, capacity, width]`, what each node returned, in the order in which the rows were sent.
      position: `[N, tokens]` of the routes.

    Returns:
      `[tokens, width]` float32.
    """
    total = jnp.zeros((position.shape[1], partials.shape[2]), jnp.float32)
    for node in range(partials.shape[0]):
        rows = rows_at(partials[node], jnp.maximum(position[node], 0)).astype(jnp.float32)
        total = total + jnp.where(position[node][:, None] >= 0, rows, 0.0)
    return total
