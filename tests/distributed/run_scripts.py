# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the processes of the distributed tests run: `accelerate launch ... run_scripts.py SCRIPT WORLD OUT SCENARIO... -- SCRIPT ...`.

Each scenario of a script trains once from the model and the dataset in the folder WORLD, and leaves OUT/SCENARIO with the model and
`report.json`. All of them in one launch, since to start the processes takes longer than a scenario.
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
    for script, (_, world, out, *scenarios) in zip(scripts, runs, strict=True):
        for scenario in scenarios:
            script.run(Path(world), Path(out), scenario)
            gc.freeze()  # what a scenario leaves behind, DeepSpeed's engines among it
    leave()
