"""Kernels, bytes and transfers of an update compiled by XLA."""

from __future__ import annotations

import pytest

from efficientnet_ns.benchmarks import compiled
from efficientnet_ns.config import BenchmarkConfig

_HLO = """HloModule a, entry_computation_layout={(f32[8,4]{1,0})->(f32[8,2]{1,0})}

%fused_computation (param_0: f32[8,2]) -> f32[8,2] {
  %param_0 = f32[8,2]{1,0} parameter(0)
  ROOT %negate = f32[8,2]{1,0} negate(%param_0)
}

ENTRY %main.1 (arg0.1: f32[8,4], arg1.1: bf16[4,2]) -> (f32[8,2], pred[8]) {
  %arg0.1 = f32[8,4]{1,0} parameter(0), metadata={op_name="image (uint8)"}
  %arg1.1 = bf16[4,2]{1,0:T(8,128)(2,1)} parameter(1)
  %dot.7 = f32[8,2]{1,0} dot(%arg0.1, %arg1.1), lhs_contracting_dims={1}, metadata={op_name="a(b)"}
  %bitcast.1 = f32[16]{0} bitcast(%dot.7)
  %infeed.1 = (pred[8]{0}, token[]) infeed(%bitcast.1)
  %get-tuple-element.2 = pred[8]{0} get-tuple-element(%infeed.1), index=0
  %fusion.3 = f32[8,2]{1,0} fusion(%dot.7), kind=kLoop, calls=%fused_computation
  ROOT %tuple.4 = (f32[8,2]{1,0}, pred[8]{0}) tuple(%fusion.3, %get-tuple-element.2)
}
"""


def test_count():
    """Operations inside a fusion and operations that only rename memory cost nothing."""
    dot, infeed, fusion = 8 * 4 * 4 + 4 * 2 * 2 + 8 * 2 * 4, 8 * 2 * 4 + 8, 2 * 8 * 2 * 4
    counted = compiled.count(_HLO)
    assert counted.kernels == 3
    assert counted.transfers == 1
    assert counted.megabytes == pytest.approx((dot + infeed + fusion) / 1e6)


@pytest.mark.slow
def test_of_a_model():
    options = BenchmarkConfig(
        what="compiled", model_name="efficientnet-test", image_size=32, batch_size=4
    )
    rows = {(row.name.split(": ")[-1], row.unit): row for row in compiled.run(options)}
    transfers = rows["exchanged with the host in mid-step", "times"]
    assert transfers.value == 0
    for unit in ("kernels", "MB/step"):
        plain = rows["forward, backward, RMSProp", unit]
        whole = rows["whole step (weight decay, moving average, metrics)", unit]
        # Averages and decay read and write every weight once more, in a few kernels per variable.
        assert 1 < whole.ratio < 2
        assert whole.ratio == pytest.approx(whole.value / plain.value)
    assert rows["images and labels, from the host", "MB/step"].value == 4 * (32 * 32 * 3 + 4) / 1e6
