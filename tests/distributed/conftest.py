# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


SCRIPTS = Path(__file__).parent / "run_scripts.py"
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


@pytest.fixture(scope="session")
def results(request, world, odd_world, launch, tmp_path_factory) -> Callable[[str], Path]:
    """
    `results(backend)`: a folder with a folder for each script, in which the scenarios are that `RUNS` has in the module of a test that
    is asked for; `results("none")` is of one process. Launched once, also if that fails. A module's `prepare(backend, folder, results)`
    comes before.
    """
    worlds = {"world": world, "odd_world": odd_world}
    modules = {item.module.__name__: item.module for item in request.session.items if hasattr(item.module, "RUNS")}
    done: dict[str, Path | BaseException] = {}

    def run(backend: str) -> Path:
        if backend not in done:
            out = tmp_path_factory.mktemp(backend)
            arguments = []
            for module in modules.values():
                folder = out / module.SCRIPT
                folder.mkdir()
                if hasattr(module, "prepare"):
                    module.prepare(backend, folder, run)
                arguments += [module.SCRIPT, str(worlds[module.WORLD]), str(folder), *module.RUNS[backend], "--"]
            try:
                launch(backend, SCRIPTS, *arguments, processes=1 if backend == "none" else 2)
                done[backend] = out
            except BaseException as error:
                done[backend] = error
        if isinstance(done[backend], BaseException):
            raise done[backend]
        return done[backend]

    return run
