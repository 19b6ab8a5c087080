"""The plan file: what `jmoe plan` decides and `jmoe serve` takes. JSON, versioned. No JAX."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from jmoe.sharding.mesh_config import MeshConfig
from jmoe.sharding.placement import ExpertPlacement

Objective = Literal["gpu", "price", "watt"]

FORMAT, VERSION = "jmoe-plan", 1
MAX_PLAN_BYTES = 16 << 20  # a placement of 10,000 nodes is below 1 MB


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A deployment: one cell's meshes and sizes, how often it fits the pool, and what it should do.

    Attributes:
      model: preset name or path that it was planned for.
      mesh: the cell's MeshConfig, the argument of `serve`.
      rows: decode slots of one micro-batch of one attention replica.
      num_pages, page_len: KV pages of one attention replica (page 0 included), and tokens a page.
      gpus: role -> GPU kind.
      num_cells: how many such cells the pool holds.
      precision: bytes an element, as `Precision` names them.
      slo_ms, objective: what it was planned for.
      predicted: step_ms, tokens_s and the like of one cell, and stage times in us.
      advice: "disaggregate", or "do not disaggregate" when a colocated deployment does better.
      colocated: the best colocated deployment's figures, for comparison; empty when none fits.
      why: one line.
    """

    model: str
    mesh: MeshConfig
    rows: int
    num_pages: int
    page_len: int
    gpus: dict[str, str]
    num_cells: int
    precision: dict[str, float]
    slo_ms: float
    objective: Objective
    predicted: dict[str, float]
    advice: Literal["disaggregate", "do not disaggregate"]
    colocated: dict[str, Any]
    why: str

    def to_json(self) -> str:
        """The file's text."""
        data = {"format": FORMAT, "version": VERSION} | dataclasses.asdict(self)
        return json.dumps(data, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Parses and checks a plan file's text.

        Raises:
          ValueError: not a plan of this version, or a field is missing or of the wrong shape.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"plan file: expected JSON, got {error}") from error
        if not isinstance(data, dict) or (data.pop("format", None), data.pop("version", None)) != (FORMAT, VERSION):
            raise ValueError(f'plan file: expected "format": "{FORMAT}" and "version": {VERSION}, got another file')
        names = {field.name for field in dataclasses.fields(cls)}
        if set(data) != names:
            raise ValueError(f"plan file: expected the fields {', '.join(sorted(names))}, got {', '.join(data)}")
        fields: dict[str, Any] = data
        mesh = dict(fields["mesh"])
        if mesh.get("placement") is not None:
            mesh["placement"] = ExpertPlacement.of(mesh["placement"]["nodes"])
        try:
            fields["mesh"] = MeshConfig(**mesh)
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"plan file: expected the fields of MeshConfig in 'mesh', got {error}") from error


def write_plan(plan: Plan, path: str | pathlib.Path) -> None:
    """Writes the plan file."""
    pathlib.Path(path).write_text(plan.to_json())


def read_plan(path: str | pathlib.Path) -> Plan:
    """Reads a plan file; `read_plan(path).mesh` is what `jmoe serve` takes.

    Raises:
      ValueError: too large, or not a plan.
      FileNotFoundError: no such file.
    """
    path = pathlib.Path(path)
    if path.stat().st_size > MAX_PLAN_BYTES:
        raise ValueError(f"plan file {path}: expected at most {MAX_PLAN_BYTES} bytes, got a larger file")
    return Plan.from_json(path.read_text())
