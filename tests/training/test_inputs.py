"""Input records of training."""

from __future__ import annotations

import pytest
import tensorflow as tf

from efficientnet_ns.config import Config
from efficientnet_ns.files import tfexamples, tfrecords
from efficientnet_ns.files.errors import DataError
from efficientnet_ns.resolve.resolved_config import ResolvedConfig
from efficientnet_ns.training.inputs import Inputs


def test_no_records_to_evaluate_on(tmp_path):
    image = tf.io.encode_png(tf.zeros([8, 8, 3], tf.uint8)).numpy()
    record = tfexamples.labeled_example(image, 0)
    tfrecords.write(str(tmp_path / "train-00000-of-00001"), [record])
    config = Config().override(task_name="digits", label_data_dir=str(tmp_path))
    resolved = ResolvedConfig.from_config(config)
    assert Inputs.find(resolved, evaluate=False).labeled.total == 1
    with pytest.raises(DataError, match="no records dev-00000-of-… .*--mode=train$"):
        Inputs.find(resolved, evaluate=True)
