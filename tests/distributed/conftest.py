# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from pathlib import Path

import pytest


CONFIGS = Path(__file__).parents[2] / "trl_spo" / "accelerate_configs"


@pytest.fixture(scope="session")
def launch():
    """`launch(backend, script, *arguments)` runs a script in two processes under one of the packaged configs."""

    def run(backend: str, script: Path, *arguments: str, processes: int = 2) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if processes == 1:
            command = [sys.executable, str(script), *arguments]
        else:
            if backend == "ddp":  # accelerate launches several CPU processes through MPI only
                command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
                command += ["--standalone"]
            else:
                env["DS_ACCELERATOR"] = "cpu"
                command = [sys.executable, "-m", "accelerate.commands.launch"]
                command += ["--config_file", str(CONFIGS / f"{backend}.yaml"), "--num_processes", str(processes)]
                command += ["--mixed_precision", "no", "--main_process_port", "0"]
            command += [str(script), *arguments]
        for _ in range(3):
            result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
            # The launcher looks for a free port, and another may take it before its processes do
            if result.returncode == 0 or "EADDRINUSE" not in result.stderr:
                break
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]

    return run
