# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the processes of the distributed tests run: `accelerate launch ... run_scripts.py SCRIPT WORLD OUT SCENARIO... -- SCRIPT ...`.

Each scenario of a script trains once from the model and the dataset in the folder WORLD, and leaves OUT/SCENARIO with the model and
`report.json`. Those of `resume_script.py` are its runs, in the folder OUT. All of them in one launch, since to start the processes takes
longer than a scenario.
"""

import gc
import importlib
import itertools
import sys
from pathlib import Path

from process import begin, leave


if __name__ == "__main__":
    runs = [list(words) for is_end, words in itertools.groupby(sys.argv[1:], lambda word: word == "--") if not is_end]
    scripts = [importlib.import_module(name) for name, *_ in runs]
    begin()
    # What forks comes first: afterwards there is a process group, with threads that a fork would lose
    for script, (name, world, out, *scenarios) in sorted(
        zip(scripts, runs, strict=True), key=lambda one: one[1][0] != "resume_script"
    ):
        if name == "resume_script":
            script.run_each(Path(world), [f"{out}/{scenario}" for scenario in scenarios])
            continue
        for scenario in scenarios:
            script.run(Path(world), Path(out), scenario)
            gc.freeze()  # what a scenario leaves behind, DeepSpeed's engines among it
    leave()
