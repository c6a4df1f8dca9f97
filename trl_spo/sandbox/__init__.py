# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""Small worlds with a known reward, made on the spot: see docs/sandbox.md."""

from .arithmetic import ArithmeticConfig, ArithmeticWorld
from .cache import cache_dir, cached
from .enumerable import EnumerableWorld, entropy, expectation, kl_divergence, optimal_policy, total_variation
from .stories import (
    Estimate,
    Samples,
    StoriesConfig,
    StoriesWorld,
    distinct_n,
    divergence,
    qualities,
    reward,
    sample,
    sequence_log_probs,
    win_rate,
    write_story,
)
