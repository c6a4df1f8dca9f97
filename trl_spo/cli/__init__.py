# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
