"""From `jmoe plan` to `jmoe serve --plan`: what the planner writes down is what is served."""

import json
import signal

import pytest
from served_cell import ServedCell

from jmoe.planner.plan_file import read_plan
from jmoe.serving.cli import main
from jmoe.serving.grpc_client import Client
from jmoe.serving.requests import SamplingParams

# GPUs so small that a plan's KV pool fits a test: 1.2 MB each.
HARDWARE = """
[gpus.{name}]
price = 1.0
watts = 100
memory_gb = 0.0012
memory_gb_s = 100
bf16_tflops = 1
fp8_tflops = 0
scale_up_gb_s = 10
scale_up_domain = 8
gpus_per_host = 8
nics_per_host = 1
nic_gbps = 100
matmul_fraction = 0.9
memory_fraction = 0.9
notes = "not a GPU"
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory, tiny_checkpoint):
    for name in ("pandas", "pyarrow"):
        pytest.importorskip(name, reason="the `planner` extra is not installed")
    folder = tmp_path_factory.mktemp("plan")
    (folder / "gpus.toml").write_text("".join(HARDWARE.format(name=name) for name in ("small", "tiny")))
    words = ["plan", "--model", str(tiny_checkpoint), "--gpus", "small:2,tiny:2", "--prompt-len", "20"]
    words += ["--output-len", "12", "--hardware", str(folder / "gpus.toml"), "--output", str(folder / "plan.json")]
    assert main(words) == 0
    return folder / "plan.json"


def test_a_plan_is_served_as_it_was_written(planned, tiny_checkpoint, tmp_path):
    plan = read_plan(planned)
    words = ["--plan", str(planned), "--executor", "inline", "--max-len", "64"]
    cell = ServedCell(tmp_path, tiny_checkpoint, *words, sizes={})
    try:
        with Client(cell.address) as client:
            info, stats = client.model_info(), client.stats()
            mesh = (info.attention, info.expert, info.num_micro_batches, info.attention_tensor, info.expert_tensor)
            wanted = plan.mesh
            assert mesh == (
                wanted.attention, wanted.expert, wanted.num_micro_batches, wanted.attention_tensor,
                wanted.expert_tensor,
            )  # fmt: skip
            assert info.num_slots == wanted.attention * wanted.num_micro_batches * plan.rows
            assert stats["free_pages"] == wanted.attention * (plan.num_pages - 1)  # page 0 is the idle one
            done = client.generate([5, 6, 7], SamplingParams(max_tokens=9, ignore_eos=True))
            assert done.num_output_tokens == 9
        cell.process.send_signal(signal.SIGTERM)
        assert cell.end()[0] == 0
    finally:
        cell.close()


def test_another_file_is_no_plan(planned, tiny_checkpoint, capsys):
    data = json.loads(planned.read_text()) | {"version": 7}
    other = planned.with_name("other.json")
    other.write_text(json.dumps(data))
    assert main(["serve", str(tiny_checkpoint), "--plan", str(other)]) != 0
    assert "plan file" in capsys.readouterr().err
