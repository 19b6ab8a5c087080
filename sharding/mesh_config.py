"""MeshConfig: how many devices serve each role, and the order in which they stand on the joint axis. No JAX."""

import dataclasses
import math
from typing import Literal

from jmoe.sharding.placement import ExpertPlacement

AXIS = "device"  # the one axis of the joint mesh: attention devices first, then expert devices


@dataclasses.dataclass(frozen=True, slots=True)
class MeshConfig:
    """Two roles on one joint axis: M attention replicas x tensor ranks, then N expert nodes x tensor ranks.

    Args:
      attention: M, the number of attention replicas (data parallel; each has its own requests and KV pages).
      expert: N, the number of expert nodes (expert parallel; a node is one tensor group).
      num_micro_batches: m, how many slices of the batch are in flight.
      attention_tensor: tensor-parallel ranks of one attention replica.
      expert_tensor: tensor-parallel ranks of one expert node.
      placement: which node holds which experts; None means contiguous and balanced.
      directions: "both" lets one exchange carry a dispatch and a combine (lockstep, fills at m = 4), "one" gives
        each its own (fills at m = 3), "auto" takes "both" from m = 4 on.
      transport: how rows travel: "ppermute", or "auto" for the best supported one.
      colocated: every device plays both roles, so there is one set of devices, no exchange between meshes, and
        `directions` and `transport` say nothing. `MeshConfig.colocate` is the short way to make one.

    Raises:
      ValueError: a count below 1, a placement for another number of nodes, or a colocated mesh whose roles need
        different numbers of devices.
    """

    attention: int = 1
    expert: int = 1
    num_micro_batches: int = 2
    attention_tensor: int = 1
    expert_tensor: int = 1
    placement: ExpertPlacement | None = None
    directions: Literal["auto", "one", "both"] = "auto"
    transport: Literal["auto", "ppermute"] = "auto"
    colocated: bool = False

    def __post_init__(self):
        for name in ("attention", "expert", "num_micro_batches", "attention_tensor", "expert_tensor"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"MeshConfig.{name}: expected at least 1, got {value}")
        if self.directions not in ("auto", "one", "both"):
            raise ValueError(f"MeshConfig.directions: expected 'auto', 'one' or 'both', got {self.directions!r}")
        if self.transport not in ("auto", "ppermute"):
            raise ValueError(f"MeshConfig.transport: expected 'auto' or 'ppermute', got {self.transport!r}")
        if self.placement is not None and self.placement.num_nodes != self.expert:
            raise ValueError(
                f"MeshConfig.placement: expected {self.expert} nodes (MeshConfig.expert), "
                f"got a placement over {self.placement.num_nodes}"
            )
        if self.colocated and self.num_attention_devices != self.num_expert_devices:
            raise ValueError(
                f"MeshConfig.colocated: expected as many expert devices as attention devices, "
                f"{self.attention} x {self.attention_tensor}, got {self.expert} x {self.expert_tensor}"
            )

    @classmethod
    def colocate(
        cls,
        num_devices: int,
        tensor: int = 1,
        num_micro_batches: int = 1,
        placement: ExpertPlacement | None = None,
    ) -> "MeshConfig":
        """Both roles on the same devices: num_devices / tensor attention replicas, which are the expert nodes as well.

        tensor = 1 is data-parallel attention with expert parallelism; tensor = num_devices is tensor parallelism alone.

        Raises:
          ValueError: a count below 1, or a tensor size that does not divide the devices.
        """
        if num_devices < 1 or tensor < 1 or num_devices % tensor:
            raise ValueError(
                f"MeshConfig.colocate: expected a tensor size that divides the number of devices, both at least 1, "
                f"got {num_devices} devices and tensor {tensor}"
            )
        groups = num_devices // tensor
        return cls(
            groups, groups, num_micro_batches,
            attention_tensor=tensor, expert_tensor=tensor, placement=placement, colocated=True,
        )  # fmt: skip

    @property
    def num_attention_devices(self) -> int:
        return self.attention * self.attention_tensor

    @property
    def num_expert_devices(self) -> int:
        return self.expert * self.expert_tensor

    @property
    def num_devices(self) -> int:
        return self.first_expert_device + self.num_expert_devices

    @property
    def first_expert_device(self) -> int:
        """Where the expert nodes begin on the joint axis."""
        return 0 if self.colocated else self.num_attention_devices

    @property
    def num_slices(self) -> int:
        """Slices that a hidden vector is cut into on the wire, so that every tensor rank carries its share."""
        return math.lcm(self.attention_tensor, self.expert_tensor)

    def attention_device(self, replica: int, rank: int = 0) -> int:
        """Index on the joint axis of one tensor rank of an attention replica."""
        return replica * self.attention_tensor + rank

    def expert_device(self, node: int, rank: int = 0) -> int:
        """Index on the joint axis of one tensor rank of an expert node."""
        return self.first_expert_device + node * self.expert_tensor + rank

    def role(self, device: int) -> Literal["attention", "expert"]:
        """The role of a device on the joint axis; "attention", the one that answers the host, where it plays both."""
        return "attention" if device < self.num_attention_devices else "expert"

    def plays(self, device: int, role: Literal["attention", "expert"]) -> bool:
        """Whether a device on the joint axis plays a role."""
        return self.colocated or self.role(device) == role

    def resolve(self, num_experts: int) -> "MeshConfig":
        """Returns a config in which nothing is left to "auto" and the placement is explicit."""
        placement = self.placement or ExpertPlacement.balanced(num_experts, self.expert)
        if placement.num_experts != num_experts:
            raise ValueError(
                f"MeshConfig.placement: expected {num_experts} experts (the model's), got {placement.num_experts}"
            )
        directions = self.directions
        if directions == "auto":
            directions = "both" if self.num_micro_batches >= 4 else "one"
        return dataclasses.replace(self, placement=placement, directions=directions, transport="ppermute")
