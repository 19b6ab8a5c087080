"""The hardware catalogue: GPU kinds read from TOML, and how fast their memory, products and links are. No JAX."""

import dataclasses
import difflib
import functools
import importlib.resources
import pathlib
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

MAX_CATALOGUE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Kernels:
    """What kernels and links reach of the hardware's rates; one set for every kind, model and system."""

    product_fraction: float
    stream_fraction: float
    knee_power: float
    stage_overhead_us: float
    scale_up_fraction: float
    scale_up_latency_us: float
    push_us: float
    collective_latency_us: float
    nic_fraction: float
    nic_latency_us: float
    usable_memory: float
    step_host_us: float = 0.0
    nccl_costs: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "knee_power" and not value >= 1:
                raise ValueError(f"[kernels] knee_power: expected at least 1 (inf: plain roofline), got {value!r}")
            is_share = field.name.endswith(("_fraction", "_memory"))
            if not (0 < value <= 1 if is_share else value >= 0):
                expected = "a share in (0, 1]" if is_share else "at least 0"
                raise ValueError(f"[kernels] {field.name}: expected {expected}, got {value!r}")


@dataclasses.dataclass(frozen=True, slots=True)
class GpuKind:
    """One kind of GPU, its host and its links (units in the names; the catalogue's header explains each).

    Raises:
      ValueError: a quantity that is not positive (fp8_tflops and product_share may be 0).
    """

    name: str
    price: float
    watts: float
    memory_gb: float
    memory_gb_s: float
    bf16_tflops: float
    scale_up_gb_s: float
    scale_up_domain: int
    gpus_per_host: int
    nics_per_host: int
    nic_gbps: float
    matmul_fraction: float
    memory_fraction: float
    kernels: Kernels
    fp8_tflops: float = 0.0
    product_share: float = 0.0
    notes: str = ""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or (isinstance(value, int | float) and not value > 0):
                if field.name in ("fp8_tflops", "product_share") and value == 0:
                    continue
                raise ValueError(f"[gpus.{self.name}] {field.name}: expected a positive number, got {value!r}")
        for name in ("matmul_fraction", "memory_fraction", "product_share"):
            if getattr(self, name) > 1:
                raise ValueError(f"[gpus.{self.name}] {name}: expected a share of at most 1, got {getattr(self, name)}")

    @property
    def usable_bytes(self) -> float:
        """Bytes of one GPU that weights and KV pages may fill."""
        return self.memory_gb * 1e9 * self.kernels.usable_memory

    @property
    def stream_bytes_s(self) -> float:
        """Bytes a second that a decode kernel reads from memory."""
        return self.memory_gb_s * 1e9 * self.memory_fraction * self.kernels.stream_fraction

    def product_flops_s(self, weight_bytes: float) -> float:
        """Operations a second of a decode kernel's products, for weights of that many bytes an element."""
        rate = self.fp8_tflops if weight_bytes <= 1 and self.fp8_tflops else self.bf16_tflops
        return rate * 1e12 * (self.product_share or self.matmul_fraction * self.kernels.product_fraction)

    @property
    def scale_up_bytes_s(self) -> float:
        """Bytes a second and direction of one GPU inside its scale-up domain."""
        return self.scale_up_gb_s * 1e9 * self.kernels.scale_up_fraction

    @property
    def nic_bytes_s(self) -> float:
        """Bytes a second and direction of one GPU's share of its host's NICs."""
        return self.nics_per_host * self.nic_gbps / 8 * 1e9 / self.gpus_per_host * self.kernels.nic_fraction

    def kernel_s(self, num_bytes: ArrayLike, operations: ArrayLike, weight_bytes: float) -> np.ndarray:
        """Time of a kernel that reads num_bytes and computes operations on weights of weight_bytes an element."""
        stream = np.asarray(num_bytes, np.float64) / self.stream_bytes_s
        product = np.asarray(operations, np.float64) / self.product_flops_s(weight_bytes)
        power = self.kernels.knee_power
        if power == np.inf:
            return np.maximum(stream, product)
        if power == 2:
            return np.hypot(stream, product)
        return (stream**power + product**power) ** (1 / power)

    @property
    def stage_overhead_s(self) -> float:
        return self.kernels.stage_overhead_us * 1e-6

    @property
    def step_host_s(self) -> float:
        """What the host adds between two decode steps."""
        return self.kernels.step_host_us * 1e-6


class Catalogue(Mapping[str, GpuKind]):
    """GPU kinds by lower-case name; an unknown one is answered with the names and how to add one."""

    def __init__(self, kinds: Mapping[str, GpuKind]):
        self._kinds = dict(kinds)

    def __getitem__(self, name: str) -> GpuKind:
        key = name.lower()
        if key not in self._kinds:
            near = difflib.get_close_matches(key, self._kinds, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"GPU kind: expected one of {', '.join(sorted(self._kinds))}, got {name!r}{hint} To add one, write "
                f"[gpus.{key}] with {', '.join(_required_fields())} into a TOML file and pass --hardware FILE"
            )
        return self._kinds[key]

    def plain_roofline(self) -> "Catalogue":
        """The same kinds without the knee: a kernel takes the longer of streaming and products."""
        kinds = self._kinds.values()
        return Catalogue({k.name: replace(k, kernels=replace(k.kernels, knee_power=float("inf"))) for k in kinds})

    def without_pushes(self) -> "Catalogue":
        """The same kinds, exchanges costing the stages nothing: systems whose exchange runs beside their stages."""
        kinds = self._kinds.values()
        return Catalogue({k.name: replace(k, kernels=replace(k.kernels, push_us=0.0)) for k in kinds})

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._kinds

    def __iter__(self):
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


def _required_fields() -> list[str]:
    fields = dataclasses.fields(GpuKind)
    return [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in ("name", "kernels")]


@functools.cache
def _builtin() -> dict[str, Any]:
    return tomllib.loads(importlib.resources.files("jmoe.planner").joinpath("hardware.toml").read_text())


def load_catalogue(path: str | pathlib.Path | None = None) -> Catalogue:
    """The built-in catalogue, extended or overridden by a user's TOML file of the same form.

    A user's [gpus.NAME] with a built-in name needs only the fields that differ; [kernels] likewise.

    Raises:
      ValueError: an unknown field, a missing one, or a value out of range, by name.
      FileNotFoundError: no such file.
    """
    data = _builtin()
    if path is not None:
        path = pathlib.Path(path)
        if path.stat().st_size > MAX_CATALOGUE_BYTES:
            raise ValueError(f"--hardware {path}: expected at most {MAX_CATALOGUE_BYTES} bytes, got a larger file")
        user = tomllib.loads(path.read_text())
        if unknown := set(user) - {"kernels", "gpus"}:
            raise ValueError(f"--hardware {path}: expected [kernels] and [gpus.NAME], got {sorted(unknown)}")
        gpus = {name.lower(): fields for name, fields in user.get("gpus", {}).items()}
        merged = {name: data["gpus"].get(name, {}) | fields for name, fields in gpus.items()}
        data = {"kernels": data["kernels"] | user.get("kernels", {}), "gpus": data["gpus"] | merged}
    kernels = _build(Kernels, data["kernels"], "[kernels]")
    return Catalogue(
        {name: _build(GpuKind, fields | {"name": name, "kernels": kernels}, f"[gpus.{name}]")
         for name, fields in data["gpus"].items()}
    )  # fmt: skip


def _build(kind: type, fields: Mapping[str, Any], where: str) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := set(fields) - known:
        raise ValueError(f"{where}: expected only {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    if missing := required - set(fields):
        raise ValueError(f"{where}: expected {', '.join(sorted(missing))} as well, got {', '.join(sorted(fields))}")
    return kind(**fields)


def parse_gpus(text: str, catalogue: Catalogue) -> dict[str, int]:
    """Reads `--gpus h20:64,l40s:64`: kinds and how many of each there are.

    Raises:
      ValueError: an unknown kind, or a count that is not a positive integer.
    """
    pool: dict[str, int] = {}
    for part in text.split(","):
        name, _, count = part.strip().partition(":")
        kind = catalogue[name]
        if not count.isdecimal() or not 1 <= int(count) <= 1_000_000:
            raise ValueError(f"--gpus: expected KIND:COUNT with a count of 1 to 1,000,000, got {part.strip()!r}")
        pool[kind.name] = pool.get(kind.name, 0) + int(count)
    return pool
