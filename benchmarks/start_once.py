"""One start of `jmoe.serve` up to its first token, and nothing else: what `second_start.py` times from outside.

    python benchmarks/start_once.py '{"model": "FOLDER", "rows": 128, ...}' [ATTENTION EXPERT]

The first argument holds the options of `jmoe.serve` as JSON; without numbers of devices both roles are on one.
"""

import json
import sys

import jmoe
from jmoe.sharding.mesh_config import MeshConfig


def main(options: str, *ratio: str) -> None:
    mesh = MeshConfig(int(ratio[0]), int(ratio[1]), 3) if ratio else MeshConfig.colocate(1)
    with jmoe.serve(
        mesh_cfg=mesh, progress=lambda line: print(f"SAYS {line}", flush=True), **json.loads(options)
    ) as server:
        print("READY", flush=True)
        server.generate([[1, 2, 3]], jmoe.SamplingParams(max_tokens=1, ignore_eos=True))
        print("TOKEN", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
