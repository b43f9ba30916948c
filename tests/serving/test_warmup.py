"""Warm-up requests in the server's own format."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from efficientnet_ns.files import tfrecords
from efficientnet_ns.serving import warmup


@pytest.mark.slow
def test_warm_up_requests_run(base, served):
    from tensorflow_serving.apis import prediction_log_pb2

    seen = set()
    for record in tfrecords.read(str(base / "1" / warmup.FILE)):
        log = prediction_log_pb2.PredictionLog.FromString(record.payload)
        if log.WhichOneof("log_type") == "classify_log":
            request = log.classify_log.request
            examples = request.input.example_list.examples
            inputs = {"inputs": [example.SerializeToString() for example in examples]}
        else:
            request = log.predict_log.request
            inputs = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
        name = request.model_spec.signature_name
        answer = served(name, **inputs)
        assert answer.get("valid", np.array(True)).all()
        assert request.model_spec.name == "efficientnet-test"
        seen.add((name, len(next(iter(inputs.values())))))
    names = set(served.signatures) - {"__saved_model_init_op"}
    assert seen == {(name, batch) for name in names for batch in (1, 8)} and len(names) == 5
