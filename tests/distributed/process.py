# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

"""The begin and the end of a script that the tests run."""

import functools
import gc
import importlib.metadata
import os
import sys

import torch
from accelerate import PartialState


def begin() -> None:
    """Call it when all is imported. Saves the time that `tests/conftest.py` saves too."""
    torch.set_num_threads(1)
    gc.freeze()
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


def leave() -> None:
    """
    Ends a script that has done all that it was to do, without the interpreter's own end.

    DeepSpeed's engines and default arguments in PyTorch keep the process group, destroyed or not, so that Gloo's threads are there
    to the end. One that wants the interpreter while that is torn down aborts the process: "terminate called without an active
    exception", in about one of a hundred launches.
    """
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
