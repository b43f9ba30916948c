"""The paper's ablations as a table: questions, what the paper found, and arms to compare.

An arm changes settings of the loop: fields of `Method`, of `Config` (of the students' training, and
of labeling) or of `SelectConfig`. The first arm of a study is the baseline that the others are
compared with; `{}` is the unchanged loop.

Figures are ImageNet top-1 in percent, from the section of arXiv 1911.04252 that `source` names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Method:
    """What an arm can change besides settings of training, labeling and selection.

    Attributes:
      rounds: number of students, each of which labels for the next one; 0: only the teacher.
      student_width, teacher_width: factor for the number of channels.
      steps: factor for the students' update steps.
      images: factor for the pseudo-labeled images per class.
      warm_start: the student starts from its teacher's weights.
      pretrain: the student learns from pseudo labels only, then repeats the last quarter of the
        schedule with labels only.
      labels_only: a single model learns from labels only, for the steps of teacher plus student.
      own_labels: a single model learns from labels and from its own predictions of weakly augmented
        unlabeled images (FixMatch, arXiv 2001.07685), for the steps of teacher plus student.
    """

    rounds: int = 1
    student_width: float = 1.0
    teacher_width: float = 1.0
    steps: float = 1.0
    images: float = 1.0
    warm_start: bool = False
    pretrain: bool = False
    labels_only: bool = False
    own_labels: bool = False


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the alternatives of a study.

    Attributes:
      changes: setting → value.
      paper: the paper's figure, if it reports one.
      expected: sign of the paper's difference to `against`; 0: it found none; None: it reports none.
      against: name of the arm it is compared with; "": the first one.
      quick: part of a quick study.
    """

    changes: Mapping[str, Any]
    paper: str = ""
    expected: int | None = None
    against: str = ""
    quick: bool = True


@dataclasses.dataclass(frozen=True)
class Study:
    """A question with its arms by name.

    Attributes:
      question: of the study.
      source: section of the paper.
      finding: what the paper found.
      arms: name → arm; the baseline comes first.
    """

    question: str
    source: str
    finding: str
    arms: Mapping[str, Arm]


_UNSURE, _SURE = {"min_threshold": 0.0, "max_prob": 0.7}, {"min_threshold": 0.7}
# Both are explicit, because the loop's labels may be either.
_SOFT, _HARD = {"teacher_softmax_temp": 1.0}, {"teacher_softmax_temp": -1.0}
_CLEAN = {"unl_aug": "clean"}

STUDIES: dict[str, Study] = {
    "noise": Study(
        "Does the noise on unlabeled images matter, and should the teacher be noised while it labels?",
        "§4.1",
        "Noise on the student gains 0.3 to 0.7 points; a noised teacher labels worse (B5).",
        {
            "noised student": Arm({}, "84.9"),
            "unlabeled images not augmented": Arm(_CLEAN, "84.6", -1, quick=False),
            "unlabeled images without any noise": Arm(
                {**_CLEAN, "unl_model_noise": False}, "84.3", -1
            ),
            "noised teacher": Arm({"noised_teacher": True}, "84.4", -1, quick=False),
        },
    ),
    "labels": Study(
        "Soft or hard pseudo labels, and does it depend on the teacher's confidence?",
        "§4.3, finding 3",
        "Both work where the teacher is confident; elsewhere, soft labels help and hard labels hurt.",
        {
            "soft": Arm(_SOFT),
            "hard": Arm(_HARD, "about equal", 0),
            "soft, confidence to 0.7": Arm({**_UNSURE, **_SOFT}, "77.5 to 77.9", quick=False),
            "hard, confidence to 0.7": Arm(
                {**_UNSURE, **_HARD},
                "75.8 to 77.3",
                -1,
                against="soft, confidence to 0.7",
                quick=False,
            ),
            "soft, confidence from 0.7": Arm({**_SURE, **_SOFT}, "78.0", quick=False),
            "hard, confidence from 0.7": Arm(
                {**_SURE, **_HARD}, "78.0", 0, against="soft, confidence from 0.7", quick=False
            ),
        },
    ),
    "ratio": Study(
        "How many unlabeled images for each labeled one?",
        "§4.3, finding 7",
        "A large ratio helps large models, because they train longer on unlabeled images.",
        {
            "3:1": Arm({"unlabel_ratio": 3.0}, "84.0 (B4), 87.4 (L2)"),
            "1:1": Arm({"unlabel_ratio": 1.0}, "84.0 (B4), 86.7 (L2)", -1, quick=False),
            "6:1": Arm({"unlabel_ratio": 6.0}, "+0.5 (L2)", 1, quick=False),
        },
    ),
    "amount": Study(
        "How many unlabeled images are needed?",
        "§4.3, finding 2",
        "More is better; a sixteenth of 130 million is still nearly as good as all (B4).",
        {
            "all": Arm({}, "84.0"),
            # A random part (use_top=0); the most confident images would be a different question.
            "a quarter": Arm({"images": 1 / 4, "use_top": 0}, "83.8", -1, quick=False),
            "a sixteenth": Arm({"images": 1 / 16, "use_top": 0}, "83.9", -1, quick=False),
            "none: labels only, as many steps": Arm({"labels_only": True}, "83.2", -1),
        },
    ),
    "size": Study(
        "Should the student, or the teacher, be larger?",
        "§4.3, findings 1 and 4",
        "A larger student is better (B4 to B4 84.0, to B5 84.7), and so is a larger teacher.",
        {
            "student as the teacher": Arm({}, "84.0"),
            "student twice as wide": Arm({"student_width": 2.0}, "84.7", 1, quick=False),
            "teacher twice as wide": Arm({"teacher_width": 2.0}, "better", 1, quick=False),
        },
    ),
    "balance": Study(
        "Must the classes be balanced?",
        "§4.3, finding 5",
        "Balancing helps small models and matters little for large ones.",
        {
            "balanced": Arm({}),
            "every image once": Arm({"use_all": True}, "worse (small models)", -1),
        },
    ),
    "joint": Study(
        "Train on labels and pseudo labels together, or one after the other?",
        "§4.3, finding 6",
        "Joint training is better than pretraining on pseudo labels and fine-tuning on labels.",
        {
            "together": Arm({}),
            "pretrained, then fine-tuned": Arm({"pretrain": True}, "worse", -1, quick=False),
        },
    ),
    "start": Study(
        "Should the student start from its teacher's weights?",
        "§4.3, finding 8",
        "It then needs fewer steps, but training from scratch can end better.",
        {
            "from scratch": Arm({}),
            "teacher's weights": Arm({"warm_start": True}, "sometimes worse", -1, quick=False),
            "from scratch, a quarter of the steps": Arm({"steps": 1 / 4}, quick=False),
            "teacher's weights, a quarter of the steps": Arm(
                {"warm_start": True, "steps": 1 / 4},
                "better",
                1,
                against="from scratch, a quarter of the steps",
                quick=False,
            ),
        },
    ),
    "teaching": Study(
        "Is a teacher better than the student's own predictions during training?",
        "not in the paper; FixMatch is arXiv 2001.07685",
        "The paper does not compare with consistency training.",
        {
            "a teacher's labels": Arm({}),
            "own labels (FixMatch, threshold 0.95)": Arm({"own_labels": True}),
            "labels only, as many steps": Arm({"labels_only": True}),
        },
    ),
    "rounds": Study(
        "Does the student make a better teacher for the next one?",
        "§4.2",
        "B7 teaches an L2 with 87.6; that, one with 88.1; and that, at 28:1, one with 88.4.",
        {
            "1 round": Arm({"rounds": 1}, "87.6"),
            "the teacher": Arm({"rounds": 0}, "85.0", -1),
            "2 rounds": Arm({"rounds": 2}, "88.1", 1),
            "3 rounds": Arm({"rounds": 3}, "88.4", 1, quick=False),
        },
    ),
}
