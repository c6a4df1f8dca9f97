# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What we need of TRL beyond its documented interface, in one place.

TRL's trainers change between minor releases, so each minor release is admitted here after the tests have passed on it:
move `TRL_BELOW`, and the same bound in pyproject.toml. At import, the parameters that we pass are compared with TRL's.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version

from packaging.version import Version


TRL_MIN, TRL_BELOW = "1.16.0", "1.17.0"


def check_trl_version(installed: str) -> None:
    """Raises an `ImportError` that names the supported window if TRL `installed` is outside of it."""
    if not Version(TRL_MIN) <= Version(installed) < Version(TRL_BELOW):
        raise ImportError(
            f"trl_spo supports trl>={TRL_MIN},<{TRL_BELOW}, but trl {installed} is installed: run "
            f'`pip install "trl>={TRL_MIN},<{TRL_BELOW}"`.'
        )


check_trl_version(version("trl"))

from trl.data_utils import _tokenize, common_prefix_length, is_conversational  # noqa: E402
from trl.distributed import DistributedBackend  # noqa: E402
from trl.generation.vllm_generation import VLLMGeneration  # noqa: E402
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # noqa: E402
from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: E402
from trl.models.utils import (  # noqa: E402
    _ForwardRedirection,
    disable_gradient_checkpointing,
    unwrap_model_for_generation,
)
from trl.trainer import dpo_trainer  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402
from trl.trainer.utils import (  # noqa: E402
    FusedCausalLMOutput,
    add_fused_lm_head,
    create_model_from_path,
    get_config_model_id,
    global_then_local_main_first,
    maybe_gather_lm_head_ctx,
    pad,
    use_adapter,
)


__all__ = [
    "ChunkedDivergenceFunction",
    "ChunkedLogProbFunction",
    "DataCollatorForPreference",
    "DistributedBackend",
    "FusedCausalLMOutput",
    "VLLMGeneration",
    "_ForwardRedirection",
    "_tokenize",
    "add_fused_lm_head",
    "check_trl_version",
    "common_prefix_length",
    "create_model_from_path",
    "disable_gradient_checkpointing",
    "get_config_model_id",
    "global_then_local_main_first",
    "is_conversational",
    "maybe_gather_lm_head_ctx",
    "no_reference_model",
    "pad",
    "unwrap_model_for_generation",
    "use_adapter",
]


# (callable, the parameters that we rely on, in order)
_SIGNATURES: list[tuple[Callable, list[str]]] = [
    (
        DPOTrainer.__init__,
        ["self", "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"]
        + ["compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config"],
    ),
    (DPOTrainer._prepare_dataset, ["self", "dataset", "processing_class", "args", "dataset_name"]),
    (DPOTrainer._compute_loss, ["self", "model", "inputs", "return_outputs"]),
    (DPOTrainer.compute_ref_log_probs, ["self", "model", "inputs"]),
    (
        KTOTrainer.__init__,
        ["self", "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"]
        + ["compute_metrics", "callbacks", "optimizers", "quantization_config", "peft_config"],
    ),
    (KTOTrainer._prepare_dataset, ["self", "dataset", "processing_class", "args", "dataset_name"]),
    (KTOTrainer._compute_loss, ["self", "model", "inputs", "return_outputs"]),
    (KTOTrainer._compute_kl_logps, ["self", "model", "batch"]),
    (KTOTrainer.compute_ref_log_probs, ["self", "model", "inputs"]),
    (
        ChunkedDivergenceFunction.forward,
        ["ctx", "student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias"]
        + ["beta", "temperature", "student_logit_scale", "student_final_logit_softcapping", "teacher_logit_scale"]
        + ["teacher_final_logit_softcapping"],
    ),
    (
        ChunkedLogProbFunction.forward,
        ["ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]
        + ["logit_scale", "outputs"],
    ),
    (add_fused_lm_head, ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]),
    (_ForwardRedirection.__call__, ["self", "wrapper_module", "original_module", "method", "args", "kwargs"]),
    (
        unwrap_model_for_generation,
        ["model", "accelerator", "gather_deepspeed3_params", "generation_kwargs", "gradient_checkpointing_kwargs"],
    ),
    (VLLMGeneration.generate, ["self", "prompts", "images", "num_generations", "profiler"]),
]

for _function, _expected in _SIGNATURES:
    _found = list(inspect.signature(_function).parameters)
    if _found != _expected:
        raise ImportError(
            f"trl {version('trl')} changed `{_function.__module__}.{_function.__qualname__}`: its parameters are "
            f"{_found}, trl_spo expects {_expected}. Install trl=={TRL_MIN} and report it."
        )


@contextmanager
def no_reference_model(model_is_path: bool) -> Iterator[None]:
    """
    Keeps `DPOTrainer.__init__` from loading a reference model, which it does whatever its loss needs.

    Args:
        model_is_path (`bool`):
            Whether the policy is given by its path, so that the first model which is loaded is the policy.
    """
    original = dpo_trainer.create_model_from_path
    policies_to_load = int(model_is_path)

    def load_policy_only(*args, **kwargs):
        nonlocal policies_to_load
        if policies_to_load == 0:
            return None
        policies_to_load -= 1
        return original(*args, **kwargs)

    dpo_trainer.create_model_from_path = load_policy_only
    try:
        yield
    finally:
        dpo_trainer.create_model_from_path = original
