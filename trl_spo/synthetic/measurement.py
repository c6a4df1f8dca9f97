# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""How long a training takes and how much memory it needs."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from .files import read_json, write_json


class Measurement(TrainerCallback):
    """
    Writes the seconds and the peak memory of a training to a file, at each checkpoint and at the end.

    A training that goes on from a checkpoint goes on from what was measured up to there: the work that was lost is not counted.

    Args:
        path (`Path`):
            The file: `seconds`, `peak_memory` in bytes, the largest of a process, and `memory_of`, which is `"device"` or, without one, `"process"`; and the number of `processes`.
        accelerator ([`~accelerate.Accelerator`]):
            That of the trainer.
    """

    def __init__(self, path: Path, accelerator: Accelerator):
        self.path = path
        self.accelerator = accelerator
        self._seconds, self._peak, self._start = 0.0, 0, 0.0
        self._on_cuda = accelerator.device.type == "cuda"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0 and self.path.is_file():
            before = read_json(self.path)
            self._seconds, self._peak = before["seconds"], before["peak_memory"]
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()

    def _write(self) -> None:
        seconds = self._seconds + time.perf_counter() - self._start
        if self._on_cuda:
            memory_of, peak = "device", torch.cuda.max_memory_allocated()
        else:
            # In bytes on macOS, in KiB elsewhere
            unit = 1 if sys.platform == "darwin" else 1024
            memory_of, peak = "process", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        mine = torch.tensor([peak], dtype=torch.int64, device=self.accelerator.device)
        peak = max(self._peak, int(self.accelerator.gather(mine).max()))
        if self.accelerator.is_main_process:
            measured = {"seconds": seconds, "peak_memory": peak, "memory_of": memory_of}
            write_json(self.path, {**measured, "processes": self.accelerator.num_processes})
