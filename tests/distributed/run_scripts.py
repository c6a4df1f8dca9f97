# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the processes of the distributed tests run: `accelerate launch ... run_scripts.py SCRIPT WORLD OUT SCENARIO... -- SCRIPT ...`.

Each scenario of a script trains once from the model and the dataset in the folder WORLD, and leaves OUT/SCENARIO with the model and
`report.json`. All of them in one launch, since to start the processes takes longer than a scenario.
"""

import importlib
import itertools
import sys
from pathlib import Path

from process import begin, leave


if __name__ == "__main__":
    begin()
    for is_end, words in itertools.groupby(sys.argv[1:], lambda word: word == "--"):
        if not is_end:
            name, world, out, *scenarios = words
            script = importlib.import_module(name)
            for scenario in scenarios:
                script.run(Path(world), Path(out), scenario)
    leave()
