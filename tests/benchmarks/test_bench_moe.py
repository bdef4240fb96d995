"""The experts benchmark's options, without a device."""

from __future__ import annotations

from benchmarks import bench_moe, experts


def test_what_is_timed_by_default_exists():
    assert set(bench_moe.parse([]).impl.split(",")) <= set(experts.EXPERTS)
