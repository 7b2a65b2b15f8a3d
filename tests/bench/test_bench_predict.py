"""`bench predict` in a short form."""

from __future__ import annotations

import pytest

from tune_ego.bench.predict import bench_predict


@pytest.mark.slow
def test_predict_is_compared_with_its_parts() -> None:
    benchmark = bench_predict(width=0.02, repeats=1)
    whole, forward, flow, parts = (figure.median for figure in benchmark.figures)
    assert parts == pytest.approx(1 / (1 / forward + 136 / 16 / flow))
    assert benchmark.ratios[0].value == pytest.approx(whole / parts) and benchmark.ratios[0].value > 0.2
