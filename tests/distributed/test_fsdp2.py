# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.distributed
def test_on_sharded_models(odd_world, launch):
    launch("ddp", Path(__file__).parent / "fsdp2_script.py", str(odd_world))
