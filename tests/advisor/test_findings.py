# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0

import json

import pytest
from scipy.stats import binomtest

from trl_spo.advisor.findings import Finding, percent, wilson


@pytest.mark.parametrize(("count", "number"), [(0, 1), (1, 1), (0, 50), (3, 50), (25, 50), (50, 50), (123, 60000)])
def test_interval_is_that_of_scipy(count, number):
    found, expected = wilson(count, number), binomtest(count, number).proportion_ci(0.95, method="wilson")
    assert found["rate"] == count / number
    assert found["interval"] == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_nothing_has_no_share():
    assert wilson(0, 0) == {"rate": None, "interval": None, "number": 0}
    assert percent(wilson(0, 0)) == "none"


def test_interval_is_told_unless_all_were_looked_at():
    share = wilson(1, 4)
    assert (
        percent(share) == "25.0% (4.6% to 69.9%)"
    )  # Wilson's, by hand: (0.25 + 0.4803) / 1.9604 ± 1.96 · 0.3265 / 1.9604
    assert percent(share, exact=True) == "25.0%"


def test_finding_goes_through_json():
    finding = Finding("code", "info", "title", "detail", data={"share": wilson(1, 4)})
    assert json.loads(json.dumps(finding.to_dict()))["data"]["share"]["rate"] == 0.25
    with pytest.raises(ValueError, match="`severity` must be one of"):
        Finding("code", "fatal", "title", "detail")
