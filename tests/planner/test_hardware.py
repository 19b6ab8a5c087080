"""The catalogue: the paper's Table 3, and what users may add."""

import dataclasses

import pytest

from jmoe.planner.hardware import load_catalogue, parse_gpus

# arXiv 2504.02263, Table 3: relative price, GB, GB/s, TFLOPS.
TABLE_3 = {
    "l20": (1.00, 48, 864, 119.5),
    "h800": (5.28, 80, 3430.4, 989),
    "a800": (2.26, 80, 2039, 312),
    "h20": (1.85, 96, 4096, 148),
    "l40s": (1.08, 48, 864, 362),
}


def test_the_papers_table():
    kinds = load_catalogue()
    got = {name: (k.price, k.memory_gb, k.memory_gb_s, k.bf16_tflops) for name, k in kinds.items() if name in TABLE_3}
    assert got == TABLE_3
    assert (kinds["h20"].watts, kinds["l40s"].watts) == (500, 350)
    assert {"h100", "h200", "b200", "gb200"} <= set(kinds)


def test_rates_in_use():
    gpu = load_catalogue()["h100"]
    assert gpu.stream_bytes_s == pytest.approx(3350e9 * 0.93 * 0.92)
    assert gpu.product_flops_s(2) == pytest.approx(989e12 * 0.776 * 0.80)
    assert gpu.product_flops_s(1) == pytest.approx(2 * gpu.product_flops_s(2), rel=1e-3)
    assert gpu.nic_bytes_s == pytest.approx(50e9 * 0.95)
    measured = dataclasses.replace(gpu, product_share=0.7)
    assert measured.product_flops_s(2) == pytest.approx(989e12 * 0.7)
    assert load_catalogue()["a800"].product_flops_s(1) == load_catalogue()["a800"].product_flops_s(2)


def test_a_users_file_adds_and_overrides(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "[kernels]\nnic_latency_us = 3\n[gpus.H100]\nprice = 4\n"
        "[gpus.mi300x]\nprice = 5\nwatts = 750\nmemory_gb = 192\n"
        "memory_gb_s = 5300\nbf16_tflops = 1307\nscale_up_gb_s = 448\nscale_up_domain = 8\ngpus_per_host = 8\n"
        "nics_per_host = 8\nnic_gbps = 400\nmatmul_fraction = 0.6\nmemory_fraction = 0.8\n"
    )
    kinds = load_catalogue(path)
    assert kinds["h100"].price == 4 and kinds["h100"].memory_gb == 80
    assert kinds["MI300X"].memory_gb == 192
    assert kinds["h20"].kernels.nic_latency_us == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gpus.x]\nprice = 1\n", "expected .*memory_gb.* as well"),
        ("[gpus.h100]\ncolour = 1\n", "got colour"),
        ("[gpus.h100]\nprice = -1\n", "price: expected a positive number"),
        ("[gpus.h100]\nmatmul_fraction = 1.5\n", "share of at most 1"),
        ("[gpus.h100]\nproduct_share = 1.5\n", "share of at most 1"),
        ("[kernels]\nnic_fraction = 0\n", "nic_fraction: expected a share"),
        ("[gpu.h100]\nprice = 1\n", "expected \\[kernels\\] and \\[gpus.NAME\\]"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_catalogue(path)


def test_pools():
    kinds = load_catalogue()
    assert parse_gpus("H20:64, l40s:8,h20:8", kinds) == {"h20": 72, "l40s": 8}
    with pytest.raises(ValueError, match=r"got 'h21'; did you mean h20\?.*To add one, write \[gpus.h21\]"):
        parse_gpus("h21:4", kinds)
    for text in ("h20", "h20:0", "h20:-1", "h20:x", "h20:9999999999"):
        with pytest.raises(ValueError, match="count of 1 to 1,000,000"):
            parse_gpus(text, kinds)
