# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""GPUs by name."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """
    A device.

    Args:
        name (`str`):
            Its name.
        memory (`float`):
            GiB.
        flops (`float`, *optional*):
            Dense multiplications and additions in 16 bits per second, at best.
        bandwidth (`float`, *optional*):
            Bytes per second that its memory is read with, at best.
    """

    name: str
    memory: float
    flops: float | None = None
    bandwidth: float | None = None


# Name -> memory in GiB, TFLOP/s in bfloat16 without sparsity (float16 where there is none), TB/s; by the makers' data
# sheets
_TABLE = {
    "b200": (180, 2250, 8.0),
    "h200": (140, 989, 4.8),
    "h100": (80, 989, 3.35),
    "h100-pcie": (80, 756, 2.0),
    "a100": (80, 312, 2.0),
    "a100-40gb": (40, 312, 1.55),
    "a40": (48, 150, 0.7),
    "a30": (24, 165, 0.93),
    "a10": (24, 125, 0.6),
    "l40s": (48, 362, 0.86),
    "l4": (24, 121, 0.3),
    "rtx-6000-ada": (48, 364, 0.96),
    "rtx-a6000": (48, 155, 0.77),
    "rtx-5090": (32, 210, 1.8),
    "rtx-4090": (24, 165, 1.0),
    "rtx-3090": (24, 71, 0.94),
    "v100": (32, 125, 0.9),
    "t4": (16, 65, 0.3),
    "mi300x": (192, 1307, 5.3),
}


def known_gpus() -> list[str]:
    """Their names."""
    return list(_TABLE)


def find_gpu(name: str) -> Gpu:
    """
    A GPU by its name.

    Args:
        name (`str`):
            One of [`known_gpus`], such as `"h100"`; the memory of another one, such as `"48GB"`; or `"local"` for that
            of this machine.

    Returns:
        [`Gpu`]

    Raises:
        `ValueError`: it is none of these.
    """
    if name == "local":
        gpu = local_gpu()
        if gpu is None:
            raise ValueError(
                "`gpu` is 'local', but this machine has none. Name the one of the training, such as 'h100'."
            )
        return gpu
    key = (
        re.sub(r"[\s_]+", "-", name.strip().lower())
        .removeprefix("nvidia-")
        .removeprefix("amd-")
        .removeprefix("geforce-")
    )
    key = re.sub(r"^(rtx-?)?([345]090)$", r"rtx-\2", key).removesuffix("-80gb")
    if key in _TABLE:
        memory, flops, bandwidth = _TABLE[key]
        return Gpu(key, float(memory), flops * 1e12, bandwidth * 1e12)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)-?gi?b", key)
    if match and float(match[1]) > 0:
        return Gpu(name, float(match[1]))
    raise ValueError(
        f"`gpu` must be one of {', '.join(_TABLE)}, 'local', or the memory of another one, such as '48GB'; got {name!r}."
    )


def local_gpu() -> Gpu | None:
    """The first GPU of this machine, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    words = re.sub(r"[\s_]+", "-", properties.name.lower())
    memory = properties.total_memory / 2**30
    # "NVIDIA H100 80GB HBM3" has the name of one in it; the longest name is the most exact
    names = [name for name in _TABLE if name.removesuffix("-40gb") in words]
    if not names:
        return Gpu(properties.name, memory)
    name = max(names, key=len)
    return Gpu(properties.name, memory, _TABLE[name][1] * 1e12, _TABLE[name][2] * 1e12)
