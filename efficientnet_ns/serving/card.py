"""The model card of an exported version."""

from __future__ import annotations

from collections.abc import Mapping

_TEXT = """\
# {model}, version {version}

An EfficientNet classifier of {num_classes} classes on images of {size} x {size} pixels, exported for
{target}. TensorFlow alone runs it.

## Recipe, data, accuracy

{facts}

## Preprocessing (inside the graph)

{preprocessing} Pixels are normalised with mean {mean} and standard deviation {std} of the full
range. JPEG, PNG, GIF (first frame) and BMP of any size; images above {max_pixels:,} pixels are
refused from their header.

## Signatures

| Signature | Input | Outputs |
|---|---|---|
| `serving_default` | `image_bytes` string [N] | `classes` int64 [N], `class_names` string [N], `probabilities` float32 [N, {num_classes}], `top_classes`, `top_class_names`, `top_probabilities` [N, {top_k}], `valid` bool [N] |
| `predict_images` | `images` float32 [N, H, W, 3], 0..255 | the same |
| `predict_images_uint8` | `images` uint8 [N, H, W, 3] | the same |
| `features` | `image_bytes` string [N] | `features` float32 [N, D], `valid` bool [N] |
| `classify` | `inputs`: tf.Examples with `image/encoded` | `classes` string [N, {top_k}], `scores` float32 [N, {top_k}] |

An image that cannot be decoded does not fail its batch: its `valid` is false, its class -1, its
name empty, and its probabilities and features are 0 (of `classify`: empty names, scores 0).

## How to call it

```
(printf '{{"instances": [{{"b64": "'; base64 -w0 photo.jpg; printf '"}}]}}') | \\
  curl -d @- http://localhost:8501/v1/models/{model}:predict
python -m efficientnet_ns.serving.client --model={model} photo.jpg
```

```python
import tensorflow as tf

model = tf.saved_model.load("{version}")
answer = model.signatures["serving_default"](tf.constant([open("photo.jpg", "rb").read()]))
```
"""


def text(values: Mapping[str, object], facts: Mapping[str, object]) -> str:
    """Markdown.

    Args:
      values: what the text names, see there.
      facts: further lines, e.g. the weights and their accuracy.
    """
    lines = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return _TEXT.format(**values, facts=lines)
