"""Runs every program in a separate process on tiny pictures; standard error has only our lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from fakes import ROOT, class_folders, flat_folder

from efficientnet_ns.config.program_table import PROGRAMS

# Log lines, progress lines of a whole run, and continuation lines of the log.
OURS = re.compile(r"[DIWE] \d\d:\d\d:\d\d |\[ *\d+ %\] |  ")
SMALL = (
    "--model_name=efficientnet-test --task_name=data/task.json --label_data_dir=data --train_steps=2 "
    "--train_batch_size=4 --warmup_epochs=0 --eval_batch_size=4 --input_image_size=16 --bn_momentum=0.5 "
    "--moving_average_decay=0"
)
PSEUDO = "--prediction_dir=predictions --prelim_stats_dir=statistics --output_dir=selected"
MANY = f"--unlabel_data_dir=unlabeled {PSEUDO} --task_name=data/task.json --num_image=4 --min_threshold=0"
STUDENT = "--unlabel_data_dir=selected/data --unlabel_ratio=1 --teacher_softmax_temp=1"
STAGES = "--models=efficientnet-test,efficientnet-test"
QUICK = f"{STAGES} --input_image_size=16 --teacher_steps=2 --train_steps=2 --train_batch_size=4"
WHOLE = "--model_dir=teacher --unlabel_data_dir=unlabeled --num_image=4 --min_threshold=0"
# Programs and arguments, in the order of their dependencies.
COMMANDS = [
    "make_records --source=photos --output_dir=data --validation_fraction=0.2",
    "make_records --source=more --output_dir=unlabeled --nolabeled",
    f"main --mode=train_and_eval --model_dir=teacher {SMALL}",
    "main --mode=predict --model_dir=teacher --unlabel_data_dir=unlabeled --output_dir=predictions "
    "--info_dir=info --shard_id=0",
    "import_predictions --source=p.npy --unlabel_data_dir=unlabeled --task_name=data/task.json "
    "--output_dir=imported",
    "check_data --label_data_dir=data --unlabel_data_dir=unlabeled --prediction_dir=predictions "
    "--output_dir=checked",
    "main --mode=predict --model_dir=teacher --unlabel_data_dir=data --output_dir=own --shard_id=auto",
    "check_labels --label_data_dir=data --prediction_dir=own --output_dir=doubts",
    f"filter_unlabel {MANY} --exclude=checked/exclude.csv",
    f"labeling_report {MANY} --report_path=labels.html --label_next=3",
    f"main --mode=train --model_dir=student {SMALL} {STUDENT} --augment_name=randaugment",
    "main --mode=eval --model_dir=student",
    "export_model --model_dir=student --export_dir=exported",
    "export_model --model_dir=student --export_dir=exported --format=tflite",
    "export_model --model_dir=student --export_dir=exported --format=tflite --tflite_type=int8 --check_data=photos",
    "predict_image --model_dir=student more/u0.png",
    "predict_image --model_dir=exported more/u0.png",
    "convert_checkpoint --model_dir=student --target=student.safetensors",
    "evaluate_robustness --model_dir=student --report_dir=robust --label_data_dir=data "
    "--corrupt=brightness --severities=1",
    "list_models",
    f"noisy_student --labeled=photos --unlabeled=more --work_dir=run {QUICK}",
    f"label_beam --work_dir=beam {WHOLE}",
    f"label_ray --work_dir=ray {WHOLE}",
]


@pytest.mark.slow
def test_programs_print_nothing_foreign(tmp_path):
    class_folders(tmp_path / "photos", dict.fromkeys(("red", "green"), 10))
    flat_folder(tmp_path / "more", 12)
    np.save(tmp_path / "p.npy", np.full([12, 2], 0.5))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "XLA_"))}
    environment["PYTHONPATH"] = str(ROOT)
    foreign = {}
    for command in COMMANDS:
        program, *arguments = command.split()
        line = [sys.executable, "-m", f"efficientnet_ns.{program}", *arguments]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        if done.returncode and "cannot be imported" in done.stderr:
            continue
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        plan = set()
        if program == "noisy_student":  # It prints its plan before it starts.
            plan = set(done.stderr.split("[  0 %]")[0].splitlines())
        lines = [text for text in done.stderr.splitlines() if text and text not in plan]
        foreign[command] = [text for text in lines if not OURS.match(text)]
    assert {command: lines for command, lines in foreign.items() if lines} == {}


def test_every_program_is_run_or_named_here():
    run = {command.split()[0] for command in COMMANDS}
    elsewhere = {
        "demo",
        "study",
        "proc_svhn",
        "benchmark",
        "serving.client",
    }  # They run programs listed above.
    assert run | elsewhere == set(PROGRAMS)
