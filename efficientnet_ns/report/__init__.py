"""Building blocks of an HTML report in a single file: no scripts, no server, no other files.

Every function except `write_page` converts data to an HTML fragment without side effects. All text
is escaped, and images are inlined as data URIs.

"Top-1 probabilities" are float [N] in [0, 1], masks bool [N] (or 0/1), class indices int [N] in
0..C-1; all may be anything that `numpy.asarray` accepts. `images` is the number of images that each
of the N entries represents, so counts are sufficient. For empty data, functions return a short
paragraph (`NOTHING`). An invalid shape or range raises a ValueError that names the argument.
"""

from efficientnet_ns.report.measures import CALIBRATION_BINS, Calibration, Confusion
from efficientnet_ns.report.page import Section, write_page
from efficientnet_ns.report.pictures import image_grid, thumbnail
from efficientnet_ns.report.plots import (
    HISTOGRAM_BINS,
    agreement_by_confidence,
    class_balance,
    confidence_by_class,
    confidence_histogram,
    learning_curves,
)
from efficientnet_ns.report.review import ReviewImage, write_review
from efficientnet_ns.report.tables import NOTHING, details, paragraph, table
from efficientnet_ns.report.truth import confusion, reliability

__all__ = [
    "CALIBRATION_BINS",
    "Calibration",
    "Confusion",
    "HISTOGRAM_BINS",
    "details",
    "paragraph",
    "NOTHING",
    "ReviewImage",
    "Section",
    "agreement_by_confidence",
    "class_balance",
    "confidence_by_class",
    "confidence_histogram",
    "confusion",
    "image_grid",
    "learning_curves",
    "reliability",
    "table",
    "thumbnail",
    "write_page",
    "write_review",
]
