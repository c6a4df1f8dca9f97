# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""The training that advice is asked for: the method's options, and the processes that it is launched in."""

import json
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from ..cli.launch import accelerate_config_path
from .findings import Finding


# Method -> its config, and the options that make it what it is
CONFIGS = {
    "dpo": ("trl:DPOConfig", {}),
    "ipo": ("trl:DPOConfig", {"loss_type": ["ipo"]}),
    "kto": ("trl:KTOConfig", {}),
    "soft_po": ("trl_spo:SoftPOConfig", {}),
    "stable_po": ("trl_spo:StablePOConfig", {}),
    "sspo": ("trl_spo:SSPOConfig", {}),
    "sspo_kto": ("trl_spo:SSPOKTOConfig", {}),
}
# Options that concern the machine that trains, and not this one
_OF_THE_MACHINE = (
    "bf16",
    "fp16",
    "tf32",
    "use_cpu",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "output_dir",
    "push_to_hub",
    "use_liger_kernel",
)


def method_name(name: str) -> str:
    """
    The name of a method as it is used here.

    Args:
        name (`str`):
            Such as `"soft_po"` or `"soft-po"`.

    Raises:
        `ValueError`: there is no such method.
    """
    method = name.replace("-", "_")
    if method not in CONFIGS:
        known = ", ".join(known.replace("_", "-") for known in CONFIGS)
        raise ValueError(f"`method` must be one of {known}, got {name!r}.")
    return method


def config_class(method: str) -> type:
    """The config of a method's trainer."""
    module, _, name = CONFIGS[method][0].partition(":")
    return getattr(import_module(module), name)


def defaults_of(config: type) -> dict[str, Any]:
    """What the fields of a dataclass are if they are not given."""
    return {
        option.name: option.default_factory() if option.default_factory is not MISSING else option.default
        for option in fields(config)
        if option.init
    }


@dataclass(frozen=True)
class Launch:
    """
    The processes that a training is launched in.

    Args:
        name (`str`, *optional*):
            Name of the accelerate config.
        num_processes (`int`, *optional*, defaults to `1`):
            Number of processes, each with a device of its own.
        zero_stage (`int`, *optional*, defaults to `0`):
            Of DeepSpeed; 0 without it.
        fsdp (`bool`, *optional*, defaults to `False`):
            Whether FSDP shards the model.
        deepspeed (`bool`, *optional*, defaults to `False`):
            Whether DeepSpeed runs the training.
        offload_optimizer, offload_parameters (`bool`, *optional*, defaults to `False`):
            What is kept in the memory of the CPU.
        cpu (`bool`, *optional*, defaults to `False`):
            Whether it runs without a GPU.
    """

    name: str | None = None
    num_processes: int = 1
    zero_stage: int = 0
    fsdp: bool = False
    deepspeed: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    cpu: bool = False


def read_launch(accelerate_config: str | None = None, num_processes: int | None = None) -> Launch:
    """
    Reads an accelerate config.

    Args:
        accelerate_config (`str`, *optional*):
            Path, or name of a packaged one. Without, a process a device.
        num_processes (`int`, *optional*):
            Overrides that of the config. If neither says so, as many as this machine has GPUs.

    Returns:
        [`Launch`]

    Raises:
        `ValueError`: there is no such config, or the number is not possible.
    """
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"`num_processes` must be at least 1, got {num_processes}.")
    if accelerate_config is None:
        return Launch(num_processes=num_processes or 1)
    path = Path(accelerate_config_path(accelerate_config))
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"The accelerate config '{path}' must contain a YAML mapping.")
    if num_processes is None:
        num_processes = config.get("num_processes")
    if num_processes in (None, -1):
        import torch

        num_processes = max(torch.cuda.device_count(), 1)
    kind = str(config.get("distributed_type", "NO")).upper()
    zero, sharded = config.get("deepspeed_config") or {}, config.get("fsdp_config") or {}
    if "deepspeed_config_file" in zero:
        file = Path(zero["deepspeed_config_file"])
        of_file = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {})
        zero = {
            "zero_stage": of_file.get("stage", 0),
            "offload_optimizer_device": (of_file.get("offload_optimizer") or {}).get("device", "none"),
            "offload_param_device": (of_file.get("offload_param") or {}).get("device", "none"),
        }
    deepspeed = kind == "DEEPSPEED"
    offload = kind == "FSDP" and bool(sharded.get("fsdp_offload_params"))
    return Launch(
        name=path.stem,
        num_processes=num_processes,
        zero_stage=int(zero.get("zero_stage", 0)) if deepspeed else 0,
        fsdp=kind == "FSDP",
        deepspeed=deepspeed,
        offload_optimizer=offload or (deepspeed and zero.get("offload_optimizer_device", "none") != "none"),
        offload_parameters=offload or (deepspeed and zero.get("offload_param_device", "none") != "none"),
        cpu=bool(config.get("use_cpu")),
    )


@dataclass(frozen=True)
class Plan:
    """
    A training: a method with all of its options.

    Args:
        method (`str`):
            The method.
        options (`dict[str, Any]`):
            Value of each option of its config and of [`~trl.ModelConfig`].
        given (`frozenset[str]`):
            Those that are not at their defaults.
    """

    method: str
    options: dict[str, Any]
    given: frozenset[str] = field(default_factory=frozenset)

    def get(self, name: str) -> Any:
        """Value of an option that the method has."""
        return self.options[name]

    def told(self, name: str) -> str:
        """An option as it is written in messages, with the remark that it is the default if it is."""
        return f"`{name}={self.options[name]}`" + ("" if name in self.given else " (the default)")

    @property
    def max_length(self) -> int | None:
        return self.options["max_length"]

    @property
    def truncation_mode(self) -> str:
        return self.options.get("truncation_mode", "keep_start")  # KTO has no other

    @property
    def loss_types(self) -> list[str]:
        """Losses of DPO and of its subclasses; none of KTO and Soft PO."""
        name = {"dpo": "loss_type", "ipo": "loss_type", "sspo": "loss_type", "stable_po": "upper_loss"}.get(
            self.method
        )
        value = self.options[name] if name else []
        return [value] if isinstance(value, str) else list(value)

    @property
    def dtype(self) -> str:
        """Of the weights, as they are loaded."""
        kwargs = self.options.get("model_init_kwargs") or {}
        kwargs = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
        return str(kwargs.get("dtype", self.options["dtype"])).removeprefix("torch.")

    @property
    def mixed_precision(self) -> bool:
        """Whether matrices are multiplied in 16 bits."""
        return bool(self.options["fp16"] or self.options["bf16"] in (None, True))

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass. transformers is about to rename the option."""
        new = self.options.get("activation_checkpointing")
        return bool(self.options["gradient_checkpointing"] if new is None else new)

    @property
    def reads_reference(self) -> bool:
        """Whether the loss reads a reference at all."""
        match self.method:
            case "soft_po":
                return self.get("beta") > 0 or self.get("calibration") != "none"
            case "stable_po":
                config = config_class("stable_po")
                return config.reads_reference.fget(SimpleNamespace(**self.options | {"upper_loss": self.loss_types}))
            case _:
                return True

    @property
    def takes_apart(self) -> bool:
        """Whether each response is a row of its own."""
        return self.method in ("kto", "sspo_kto")

    def sequences(self, responses: int) -> int:
        """Sequences that a process puts through the model at once, of rows with so many responses."""
        return self.get("per_device_train_batch_size") * (1 if self.takes_apart else responses)


def make_plan(method: str, options: dict[str, Any] | None = None) -> Plan:
    """
    Puts a training together.

    Args:
        method (`str`):
            The method.
        options (`dict[str, Any]`, *optional*):
            Options of its config and of [`~trl.ModelConfig`].

    Returns:
        [`Plan`]

    Raises:
        `ValueError`: an option is unknown.
    """
    from trl import ModelConfig

    defaults = defaults_of(ModelConfig) | defaults_of(config_class(method)) | CONFIGS[method][1]
    options = dict(options or {})
    for name in options:
        if name not in defaults:
            close = get_close_matches(name, defaults, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(
                f"`{name}` is no option of the method {method.replace('_', '-')!r}.{hint} Name the `method` that the options are for."
            )
    fixed = CONFIGS[method][1]
    for name, value in fixed.items():
        if options.get(name, value) not in (value, *value):
            raise ValueError(
                f"`{name}` is {options[name]!r}, and the method {method.replace('_', '-')!r} has {value!r}. Leave it out, or use `method='dpo'`."
            )
    given = frozenset(name for name, value in options.items() if value != defaults[name])
    return Plan(method, defaults | options, given)


def fitting_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of some options that a method has."""

    def fits(name: str) -> bool:
        try:
            make_plan(method, {name: options[name]})
        except ValueError:
            return False
        return True

    return {name: value for name, value in options.items() if fits(name)}


def option_findings(plan: Plan) -> list[Finding]:
    """
    What the method's own config says of the options, by making one: those that concern the machine are left out, since
    this may be another one.

    Args:
        plan ([`Plan`]):
            The training.

    Returns:
        `list[Finding]`
    """
    config = config_class(plan.method)
    known = defaults_of(config)
    options = {
        name: value
        for name, value in plan.options.items()
        if name in known and name not in _OF_THE_MACHINE and name in plan.given
    }
    try:
        config(
            output_dir="unused",
            bf16=False,
            report_to="none",
            **(CONFIGS[plan.method][1] | {n: v for n, v in options.items() if n != "report_to"}),
        )
    except (ValueError, TypeError) as error:
        return [
            Finding(
                "options_refused",
                "error",
                "The options are refused",
                f"{config.__name__}: {error}",
                "Change them as it says.",
            )
        ]
    findings = []
    if plan.takes_apart and plan.get("per_device_train_batch_size") < 2 and plan.get("loss_type") == "kto":
        findings.append(
            Finding(
                "batch_too_small",
                "error",
                "KTO needs a batch",
                f"{plan.told('per_device_train_batch_size')}: KTO estimates the KL from the other responses of the batch, and its trainer refuses that.",
                "Set it to at least 2.",
            )
        )
    return findings
