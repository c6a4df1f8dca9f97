# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import pytest


SCRIPT, WORLD = "fsdp2_script", "odd_world"
CHECKS = ["stable_po", "sspo", "sspo_text", "soft_po"]
RUNS = {"ddp": CHECKS, "none": [], "zero1": [], "zero2": [], "zero3": []}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS)
def test_on_sharded_models(results, check):
    """Each process leaves a file when what it compares is equal."""
    assert {path.name for path in (results("ddp") / SCRIPT).glob(f"{check}_[01]")} == {f"{check}_0", f"{check}_1"}
