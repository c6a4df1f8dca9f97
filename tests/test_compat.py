# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The window of TRL releases."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from trl_spo._compat import TRL_BELOW, TRL_MIN, check_trl_version


@pytest.mark.parametrize("supported", [TRL_MIN, "1.16.5", version("trl")])
def test_supported(supported):
    check_trl_version(supported)


@pytest.mark.parametrize("unsupported", ["0.29.1", "1.15.3", TRL_BELOW, "2.0.0"])
def test_unsupported_names_the_window_in_one_sentence(unsupported):
    with pytest.raises(ImportError) as error:
        check_trl_version(unsupported)
    message = str(error.value)
    assert f"trl {unsupported} is installed" in message
    assert f"trl>={TRL_MIN},<{TRL_BELOW}" in message
    assert "\n" not in message and message.count(". ") == 0


def test_unsupported_stops_the_import_of_the_trainers_only():
    code = (
        "import importlib.metadata as m; original = m.version\n"
        "m.version = lambda name: '1.15.0' if name == 'trl' else original(name)\n"
        "import trl_spo; print(trl_spo.__version__)\n"
        "trl_spo.SoftPOTrainer"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert result.stdout.strip() == original_version()
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: trl_spo supports trl>={TRL_MIN},<{TRL_BELOW}, but trl 1.15.0 is installed")


def original_version():
    import trl_spo

    return trl_spo.__version__
