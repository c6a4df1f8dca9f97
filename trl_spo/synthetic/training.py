# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Training by name, in processes of its own under `accelerate launch`, so that the memory of one training is free for the next stage.

What runs in each process is [`main`], which reads what it is told from a JSON file:

    accelerate launch --module trl_spo.synthetic.training training.json
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..cli.launch import accelerate_config_path
from .files import digest, read_json, write_json
from .identity import weights_identity


logger = logging.get_logger(__name__)

# Name of a method -> its trainer, its config, the options that make it what it is, and the forms of the dataset that it takes
METHODS: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "dpo": ("trl:DPOTrainer", "trl:DPOConfig", {}, ("preference",)),
    "ipo": ("trl:DPOTrainer", "trl:DPOConfig", {"loss_type": ["ipo"]}, ("preference",)),
    "kto": ("trl:KTOTrainer", "trl:KTOConfig", {}, ("unpaired",)),
    "soft_po": ("trl_spo:SoftPOTrainer", "trl_spo:SoftPOConfig", {}, ("preference", "ranked")),
    "stable_po": ("trl_spo:StablePOTrainer", "trl_spo:StablePOConfig", {}, ("preference",)),
    "sspo": ("trl_spo:SSPOTrainer", "trl_spo:SSPOConfig", {}, ("preference",)),
    "sspo_kto": ("trl_spo:SSPOKTOTrainer", "trl_spo:SSPOKTOConfig", {}, ("unpaired",)),
    "reward": ("trl:RewardTrainer", "trl:RewardConfig", {}, ("preference",)),
    "rloo": ("trl:RLOOTrainer", "trl:RLOOConfig", {}, ("prompts",)),
    "grpo": ("trl:GRPOTrainer", "trl:GRPOConfig", {}, ("prompts",)),
}
WITH_REWARD_MODEL = ("rloo", "grpo")
# The margin of a pair is not among them: RewardTrainer would add it to its loss, and then a difference of its scores is no
# log-odds any more, as RewardCritic takes it
_COLUMNS = {
    "preference": ("prompt", "chosen", "rejected"),
    "ranked": ("prompt", "completions", "scores", "ranking", "best"),
    "unpaired": ("prompt", "completion", "label"),
    "prompts": ("prompt",),
}
_OF_TEMPLATES = ("tools", "chat_template_kwargs")  # which all forms may have
_OURS = ("output_dir", "resume_from_checkpoint", "push_to_hub", "hub_token")
_PATHS = ("model", "dataset", "reference", "reward_model")  # which tell nothing: what is there is compared instead
_LAUNCH = (
    "accelerate_config",
    "num_processes",
)  # with another of which a training can go on; a comparison refuses it by itself


class TrainingError(RuntimeError):
    """A training has ended with an error, which it has shown."""


def _import(name: str) -> Any:
    import importlib

    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def config_class(method: str) -> type:
    """That of a method's trainer."""
    return _import(METHODS[method][1])


@dataclass(kw_only=True)
class TrainingConfig:
    """
    A training by name.

    Args:
        method (`str`):
            `"dpo"`, `"ipo"`, `"kto"`, `"soft_po"`, `"stable_po"`, `"sspo"`, `"sspo_kto"`, `"reward"` for a reward model, or `"rloo"` and
            `"grpo"`, which learn from one.
        options (`dict[str, Any]`, *optional*):
            Options of the method's config, such as `{"learning_rate": 1e-6, "beta": 0.1}` of [`~trl.DPOConfig`].
        form (`str`, *optional*):
            Form of the dataset, where the method takes several: Soft PO takes `"preference"`, the default, and `"ranked"`.
        peft (`dict[str, Any]`, *optional*):
            Options of [`~peft.LoraConfig`], to train an adapter, which is then merged.
        accelerate_config (`str`, *optional*):
            One of the packaged configs, such as `"zero3"`, or the path of another. By default that of `accelerate config`.
        num_processes (`int`, *optional*):
            Number of processes; by default as many as devices.

    Raises:
        `ValueError`: a name is unknown, or an option has no such value.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    form: str | None = None
    peft: dict[str, Any] | None = None
    accelerate_config: str | None = None
    num_processes: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {list(METHODS)}, got {self.method!r}.")
        _, config_name, fixed, forms = METHODS[self.method]
        if self.form not in (None, *forms):
            raise ValueError(f"`form` of the method {self.method!r} must be one of {list(forms)}, got {self.form!r}.")
        known = {f.name: f for f in fields(_import(config_name))}
        for name in self.options:
            if name in _OURS or name in fixed:
                raise ValueError(
                    f"`{name}` cannot be among the `options` of the method {self.method!r}, which sets it itself. Leave it out."
                )
            if name not in known:
                raise ValueError(f"`{name}` is no option of `{config_name.split(':')[1]}` (`method={self.method!r}`).")
            if isinstance(self.options[name], str) and isinstance(known[name].default, float):
                raise ValueError(
                    f"`{name}` must be a number, got the text {self.options[name]!r} (`method={self.method!r}`). In YAML, write 1.0e-6, as "
                    "1e-6 is a text there."
                )
        if self.accelerate_config is not None:
            accelerate_config_path(self.accelerate_config)
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"`num_processes` must be at least 1, got {self.num_processes}.")
        self.planned_args()
        if self.peft is not None:
            self.make_peft_config()

    def make_args(self, output_dir: str, **changes: Any) -> Any:
        """The config of the trainer."""
        _, config_name, fixed, _ = METHODS[self.method]
        return _import(config_name)(output_dir=output_dir, **fixed, **{**self.options, **changes})

    def planned_args(self) -> Any:
        """The config of the trainer in one process that has the batches of all those that are going to be launched."""
        batches = {}
        if self.method in WITH_REWARD_MODEL:  # whose config checks that whole groups of responses fit into them
            for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
                of_one = self.options.get(name, getattr(config_class(self.method), name))
                batches[name] = self.processes() * of_one
        return self.make_args("unused", **batches)

    def processes(self) -> int:
        """How many processes it is launched with."""
        if self.num_processes is not None:
            return self.num_processes
        from accelerate.commands.config.config_args import default_config_file, load_config_from_file

        file = (
            default_config_file if self.accelerate_config is None else accelerate_config_path(self.accelerate_config)
        )
        number = load_config_from_file(file).num_processes if Path(file).is_file() else -1
        if number == -1:  # the packaged ones leave it open
            import torch

            number = max(torch.cuda.device_count(), 1)
        return number

    def make_peft_config(self) -> Any:
        from peft import LoraConfig

        task = "SEQ_CLS" if self.method == "reward" else "CAUSAL_LM"
        try:
            return LoraConfig(**{"task_type": task, **self.peft})
        except TypeError as error:
            raise ValueError(f"`peft` must have options of `LoraConfig`: {error}.") from error

    def reads_reference(self) -> bool:
        """Whether the method has a reference model."""
        args = self.planned_args()
        match self.method:
            case "reward" | "rloo" | "grpo":  # the latter two load the model to start from themselves
                return False
            case "soft_po":
                return args.beta > 0 or args.calibration != "none"
            case "stable_po":
                return args.reads_reference
            case _:
                return True


def train(
    config: TrainingConfig,
    model: str,
    dataset: Path,
    folder: Path,
    reference: str | None = None,
    replace: bool = False,
    reward_model: str | None = None,
    log: Path | None = None,
) -> Path:
    """
    Trains a model, goes on from the last checkpoint of a run that was stopped, and does nothing if the model is there.

    Args:
        config ([`TrainingConfig`]):
            How.
        model (`str`):
            Path or name of the model to start from.
        dataset (`Path`):
            Folder of [`build_dataset`].
        folder (`Path`):
            Where to: the model in `model/`, checkpoints in `checkpoints/`, and `training.json`, what it was told.
        reference (`str`, *optional*):
            Path or name of the reference model; by default the model to start from.
        replace (`bool`, *optional*, defaults to `False`):
            Whether to remove a training of something else that the folder has.
        reward_model (`str`, *optional*):
            Path or name of the reward model that `"rloo"` and `"grpo"` learn from.
        log (`Path`, *optional*):
            File to which all that the training says is added, besides where it goes anyway.

    Returns:
        `Path`: folder of the model and its tokenizer. Beside it is `measured.json`: the `seconds` that the training took, without what was lost when it was
        stopped, the largest `peak_memory` of a process in bytes, and whether that is the memory of its `device` or of the `process`.

    Raises:
        `ValueError`: the folder has a training of something else.
        [`TrainingError`]: it failed.
    """
    if (config.method in WITH_REWARD_MODEL) != (reward_model is not None):
        raise ValueError(
            f"`reward_model` is {reward_model!r} for the method {config.method!r}: {list(WITH_REWARD_MODEL)} need one, and no other does."
        )
    if reference == model or not config.reads_reference():
        reference = None
    told = {
        "method": config.method,
        "options": config.options,
        "form": config.form or METHODS[config.method][3][0],
        "peft": config.peft,
        **{name: getattr(config, name) for name in _LAUNCH},
        "model": model,
        "dataset": str(dataset),
        "data": _digest_of(dataset / (config.form or METHODS[config.method][3][0])),
        "reference": reference,
        "weights": weights_identity(model),
        "reference_weights": None if reference is None else weights_identity(reference),
    }
    if reward_model is not None:
        told |= {"reward_model": reward_model, "reward_weights": weights_identity(reward_model)}
    path, result = folder / "training.json", folder / "model"
    if path.is_file():
        before = read_json(path)
        changed = [
            f"`{name}` was {before.get(name)!r} and is now {told[name]!r}"
            for name in told
            if name not in (*_PATHS, *_LAUNCH) and before.get(name) != told[name]
        ]
        if changed and not replace and has_begun(folder):
            raise ValueError(
                f"'{folder}' has another training: {'; '.join(changed)}. Remove the folder to train anew, and what was made with the model: "
                "in a run with `rounds` its evaluation and the rounds after it."
            )
        if changed:
            aside = folder.with_name(f".{folder.name}.replaced")  # all of it at once, whenever this is killed
            shutil.rmtree(aside, ignore_errors=True)
            with _only_one(folder):
                folder.rename(aside)
            shutil.rmtree(aside)
        elif result.is_dir():
            return result
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder) as lock:
        if result.is_dir():  # since then
            return result
        made = folder / "trained"
        if not made.is_dir():  # or it was stopped after that
            write_json(path, told)
            _launch(config, path, lock, log)
        if config.peft is not None:
            made = _merged(config, model, made)
        made.rename(result)
    return result


def has_begun(folder: Path) -> bool:
    """Whether a folder has something of a training that would be lost. One that crashed before its first checkpoint has not."""
    return any((folder / name).is_dir() for name in ("model", "trained")) or any(
        (folder / "checkpoints").glob("checkpoint-*")
    )


@contextmanager
def _only_one(folder: Path) -> Iterator[int]:
    """
    Makes sure that nobody else trains in a folder: `accelerate launch` outlives the process that began it, if that is killed. It holds the
    lock, which is passed on to it, for as long as it lives.
    """
    import fcntl

    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"Another process trains in '{folder}', maybe one that an earlier run has left behind. Wait for it, or stop it."
            ) from None
        except OSError as error:  # some network file systems have no locks
            logger.warning(
                "The folder '%s' cannot be locked (%s): make sure that nobody else trains in it.", folder, error
            )
        yield file
    finally:
        os.close(file)


def _launch(config: TrainingConfig, path: Path, lock: int, log: Path | None) -> None:
    folder = path.parent
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if config.accelerate_config is not None:
        command += ["--config_file", accelerate_config_path(config.accelerate_config)]
    if config.accelerate_config is not None or config.num_processes is not None:
        command += ["--num_processes", str(config.processes())]
    command += ["--module", __name__, str(path)]
    if log is None:
        status = subprocess.run(command, pass_fds=(lock,)).returncode
    else:
        status = _run_with_log(command, lock, log)
    if status != 0 or not (folder / "trained").is_dir():
        where = "above" if log is None else f"in '{log}'"
        raise TrainingError(
            f"The training in '{folder}' has ended with status {status}. Its error is {where}. Run this again: it goes on from the last "
            "checkpoint."
        )


def _run_with_log(command: list[str], lock: int, log: Path) -> int:
    """Runs a command. What it says goes to the file and to the standard error of this process."""
    with (
        log.open("ab") as file,
        subprocess.Popen(command, pass_fds=(lock,), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
    ):
        while some := process.stdout.read1():
            file.write(some)
            sys.stderr.write(some.decode(errors="replace"))
            sys.stderr.flush()
    return process.returncode


def _digest_of(form: Path) -> str:
    """Of the rows of a form, so that a dataset that was made anew is not taken for the old one."""
    digests = [
        digest(path) for path in sorted(form.rglob("data-*.arrow"))
    ]  # besides which trainers cache what they make of them
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _merged(config: TrainingConfig, model: str, adapter: Path) -> Path:
    """The model with its adapter in its weights, so that it is loaded as any other."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    # In the precision that it was trained in: in bfloat16, a small update would be rounded away
    kwargs = _init_kwargs(config.planned_args())
    if config.method == "reward":
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, **kwargs)
    else:
        base = AutoModelForCausalLM.from_pretrained(model, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=kwargs["trust_remote_code"])
    if config.method == "reward":
        base.config.pad_token_id = tokenizer.pad_token_id
    folder = adapter.with_name("merged")
    shutil.rmtree(folder, ignore_errors=True)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _init_kwargs(args: Any) -> dict[str, Any]:
    """Of `from_pretrained`, as TRL's trainers load a model by its name."""
    kwargs = {"dtype": "float32", **(args.model_init_kwargs or {})}
    kwargs.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    return kwargs


def _reward_function(model: str, args: Any) -> Any:
    """
    The rewards of a reward model for texts as RewardTrainer has read them. Given the model itself, TRL would leave out the tokens that begin and end a text.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.integrations import unset_hf_deepspeed_config

    from .critics import Request
    from .model_critics import RewardCritic

    plugin = getattr(args, "deepspeed_plugin", None)
    # Under ZeRO-3, the weights of all models would be sharded as they are loaded, and no engine would gather these. (The plugin's own
    # switch, `zero3_init_context_manager`, says nothing to `from_pretrained`.)
    if plugin is not None:
        unset_hf_deepspeed_config()
    try:
        loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype="auto").to(args.device)
    finally:
        if plugin is not None:
            plugin.set_deepspeed_weakref()
    critic = RewardCritic(name="reward model", model=loaded, tokenizer=AutoTokenizer.from_pretrained(model))

    def reward_model(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
        requests = [(i, Request(prompt, (text,))) for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))]
        return [answer["score"] for _, answer in critic.answer(requests)]

    return reward_model


def _check_saving(trainer: Any) -> None:
    """Raises a `ValueError` if the launch config would leave no model at the end, but shards only."""
    state = trainer.accelerator.state
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        if not state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {}).get(
            "stage3_gather_16bit_weights_on_model_save"
        ):
            raise ValueError(
                "The accelerate config has `zero3_save_16bit_model: false`, with which no whole model is saved. Set it to `true`."
            )
    elif trainer.is_fsdp_enabled and "FULL" not in str(state.fsdp_plugin.state_dict_type):
        raise ValueError(
            f"The accelerate config has `fsdp_state_dict_type: {state.fsdp_plugin.state_dict_type}`, with which no whole model is saved. "
            "Set it to `FULL_STATE_DICT`."
        )


def _last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that is complete: one that was being written when the process was killed has no state of the trainer yet."""

    def step(path: Path) -> int:
        return int(path.name.rpartition("-")[2])

    for path in sorted(folder.glob("checkpoint-*"), key=step, reverse=True):
        try:
            read_json(path / "trainer_state.json")
        except (FileNotFoundError, json.JSONDecodeError):
            logger.warning("The checkpoint '%s' is not complete, and the one before it is taken.", path)
            continue
        return str(path)
    return None


def main(path: str) -> None:
    """What each process runs."""
    from datasets import load_from_disk

    from .._compat import create_model_from_path
    from .measurement import Measurement

    told = read_json(Path(path))
    folder = Path(path).parent
    # In one of the processes, the batches are checked as they are
    config = TrainingConfig(**{name: told[name] for name in ("method", "options", "form", "peft")}, num_processes=1)
    checkpoints = folder / "checkpoints"
    args = config.make_args(str(checkpoints))
    splits = load_from_disk(str(Path(told["dataset"]) / told["form"]))
    splits = {
        name: split.select_columns(
            [column for column in (*_COLUMNS[told["form"]], *_OF_TEMPLATES) if column in split.column_names]
        )
        for name, split in splits.items()
    }
    kwargs: dict[str, Any] = {}
    if config.peft is not None:
        kwargs["peft_config"] = config.make_peft_config()
    if told["reference"] is not None:
        init = _init_kwargs(args)
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            init["device_map"] = None
        kwargs["ref_model"] = create_model_from_path(told["reference"], **init)
    if config.method in WITH_REWARD_MODEL:
        kwargs["reward_funcs"] = [_reward_function(told["reward_model"], args)]
    trainer = _import(METHODS[config.method][0])(
        model=told["model"],
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("test") if args.eval_strategy != "no" else None,
        **kwargs,
    )
    _check_saving(trainer)
    trainer.add_callback(Measurement(folder / "measured.json", trainer.accelerator))
    trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    new = folder / "trained.new"
    trainer.save_model(str(new))
    if trainer.accelerator.is_main_process:
        trainer.create_model_card(model_name=folder.resolve().parent.name)
        shutil.copy(checkpoints / "README.md", new / "README.md")
        shutil.rmtree(folder / "trained", ignore_errors=True)
        new.rename(folder / "trained")
    trainer.accelerator.wait_for_everyone()
    if hasattr(trainer, "end"):  # transformers >= 5.18: finishes the trackers and the process group
        trainer.end()


if __name__ == "__main__":
    main(sys.argv[1])
