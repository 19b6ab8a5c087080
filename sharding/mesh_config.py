"""MeshConfig: how many devices serve each role, and the order in which they stand on the joint axis. No JAX."""

import dataclasses
import math
from typing import Literal

from jmoe.sharding.placement import ExpertPlacement

AXIS = "device"  # the one axis of the joint mesh: attention devices first, then expert devices
DIRECTIONS = ("auto", "one", "both", "separate")
TRANSPORTS = ("auto", "ppermute", "push")


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
        each its own (fills at m = 3), "separate" lets each role send what it has made and wait for what it needs next
        (transport "push" alone; fills at m = 3). "auto" takes "separate" with "push", else "both" from m = 4 on.
      transport: how rows travel: "ppermute" (anywhere), "push" (a kernel that writes into its peers' memory: GPUs of
        one host, and virtual CPU devices of one process), or "auto" for the best supported one. With "push" each role
        is a program of its own over its own devices.
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
    directions: Literal["auto", "one", "both", "separate"] = "auto"
    transport: Literal["auto", "ppermute", "push"] = "auto"
    colocated: bool = False

    def __post_init__(self):
        for name in ("attention", "expert", "num_micro_batches", "attention_tensor", "expert_tensor"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"MeshConfig.{name}: expected at least 1, got {value}")
        for name, known in (("directions", DIRECTIONS), ("transport", TRANSPORTS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"MeshConfig.{name}: expected one of {', '.join(known)}, got {value!r}")
        if self.directions == "separate" and self.transport == "ppermute":
            raise ValueError("MeshConfig.directions: expected 'one' or 'both' with 'ppermute', got 'separate'")
        if self.colocated and self.transport == "push":
            raise ValueError(
                "MeshConfig.transport: expected none for a colocated mesh (it has no exchange), got 'push'"
            )
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
    def roles_apart(self) -> bool:
        """Whether each role's program runs over that role's devices alone: nothing of XLA's joins the two."""
        return self.transport == "push"

    def program_devices(self, role: str) -> range:
        """Indices on the joint axis of the devices that a role's program runs over: all of them, or the role's own."""
        if not self.roles_apart:
            return range(self.num_devices)
        attention = self.num_attention_devices
        return range(attention) if role == "attention" else range(attention, self.num_devices)

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

    def resolve(self, num_experts: int, best_transport: Literal["ppermute", "push"] = "ppermute") -> "MeshConfig":
        """Returns a config in which nothing is left to "auto" and the placement is explicit.

        Args:
          num_experts: of the model.
          best_transport: what "auto" stands for, which depends on the devices (`jmoe.serving.transport`).
        """
        placement = self.placement or ExpertPlacement.balanced(num_experts, self.expert)
        if placement.num_experts != num_experts:
            raise ValueError(
                f"MeshConfig.placement: expected {num_experts} experts (the model's), got {placement.num_experts}"
            )
        transport, directions = self.transport, self.directions
        if transport == "auto":
            transport = "ppermute" if self.colocated else best_transport
        if directions == "separate" and transport != "push":
            raise ValueError(f"MeshConfig.directions: expected 'one' or 'both' with {transport!r}, got 'separate'")
        if directions == "auto" and transport == "push":
            directions = "separate"
        elif directions == "auto":
            directions = "both" if self.num_micro_batches >= 4 else "one"
        return dataclasses.replace(self, placement=placement, directions=directions, transport=transport)
