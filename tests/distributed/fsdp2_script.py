# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
Soft PO's KL regularizer, Stable PO's penalty and SSPO's degree heads on models that FSDP2 shards, see `run_scripts.py`.

Accelerate does not admit FSDP2 on the CPU, so the models are sharded here by hand, with PyTorch's `fully_shard`, as
Accelerate would. Each process compares its gradient with that of the whole model on all samples.
"""

import copy
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset, load_from_disk
from soft_po_script import given_samples
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from trl_spo import SoftPOConfig, SSPOConfig, SSPOTrainer, StablePOConfig, StablePOTrainer
from trl_spo.soft_po.online_kl import OnlineKL


def shard(model: LlamaForCausalLM) -> LlamaForCausalLM:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradient(policy, reference, samples, args, accelerator) -> dict[str, torch.Tensor]:
    online_kl = OnlineKL(reference, args, accelerator, pad_token_id=0)
    online_kl.annotate(policy, samples)
    output = online_kl(policy, samples)
    (output.loss.sum() / len(samples)).backward()
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}


def stable_po_gradient(world: Path, rows: Dataset, args: StablePOConfig, sharded: bool) -> dict[str, torch.Tensor]:
    trainer = StablePOTrainer(str(world / "model"), args=args, train_dataset=rows)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter -= 0.1 * torch.randn(parameter.shape, generator=generator)
    model = shard(trainer.model) if sharded else trainer.model
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    trainer.compute_loss(model.train(), trainer._prepare_inputs(batch)).backward()
    assert trainer._totals["train"].pop()["stable/penalty"] > 0.1
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}


def check_stable_po(world: Path) -> None:
    args = StablePOConfig(
        "unused", use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, penalty_weight=5.0
    )
    rows, rank = load_from_disk(str(world / "dataset")).select(range(8)), PartialState().process_index
    whole = stable_po_gradient(world, rows, args, sharded=False)
    sharded = stable_po_gradient(world, rows.select(range(4 * rank, 4 * rank + 4)), args, sharded=True)
    assert whole.keys() == sharded.keys()
    for name in whole:
        torch.testing.assert_close(sharded[name], whole[name], rtol=1e-3, atol=1e-4)
    assert max(g.abs().max() for g in whole.values()) > 1e-1


def degree_trainer(world: Path, rows: Dataset, args: SSPOConfig, sharded: bool) -> SSPOTrainer:
    """With the gradients of a batch in its model."""
    trainer = SSPOTrainer(str(world / "model"), args=args, train_dataset=rows)
    if sharded:
        shard(trainer.model)
        assert all(isinstance(parameter, DTensor) for parameter in trainer.degree_heads.parameters())
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(batch)).backward()
    return trainer


def check_sspo(world: Path, removal: str) -> None:
    args = SSPOConfig(
        "unused",
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=removal == "text",
        removal=removal,
        stop_words=[f"w{i}" for i in range(0, 20, 3)],
        head_hidden_size=15,  # which two processes share unequally
    )
    rows, rank = load_from_disk(str(world / "dataset")).select(range(8)), PartialState().process_index
    whole = degree_trainer(world, rows, args, sharded=False)
    sharded = degree_trainer(world, rows.select(range(4 * rank, 4 * rank + 4)), args, sharded=True)
    expected, found = (dict(trainer.model.named_parameters()) for trainer in (whole, sharded))
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name].grad.full_tensor(), expected[name].grad, rtol=1e-3, atol=1e-5)
    assert min(p.grad.abs().max() for name, p in expected.items() if "degree_heads" in name) > 1e-3
    metrics, ours = whole._totals["train"].pop(), sharded._totals["train"].pop()
    for name in ("degree/key_share", "loss/degree_chosen", "loss/degree_rejected"):
        torch.testing.assert_close(ours[name], metrics[name], rtol=1e-4, atol=1e-5)

    # Written whole, and read back into the shards
    heads = sharded._gathered_heads()
    assert heads.keys() == whole.degree_heads.state_dict().keys()
    for name, value in whole.degree_heads.state_dict().items():
        assert torch.equal(heads[name], value)
    folder = world / f"heads_{removal}_{rank}"
    sharded.degree_heads.save_pretrained(folder, {name: value + 1 for name, value in heads.items()})
    sharded._load_heads(str(folder))
    for name, value in sharded._gathered_heads().items():
        assert torch.equal(value, heads[name] + 1)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.degree_heads.parameters())


def check_soft_po(world: Path) -> None:
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "online_samples_per_step": 4}
    configs = [SoftPOConfig("unused", kl_estimator=estimator, **options) for estimator in ("token", "score")]
    accelerator = Accelerator(cpu=True)  # after the configs, which reset its state
    assert accelerator.num_processes == 2
    policy = LlamaForCausalLM.from_pretrained(world / "model", dtype=torch.float32)
    reference = copy.deepcopy(policy).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    prompts = [(row, [3, 4 + row, 5 + row]) for row in range(8)]
    mine = prompts[4 * accelerator.process_index :][:4]
    for args in configs:
        whole = gradient(
            copy.deepcopy(policy), copy.deepcopy(reference), given_samples(None, prompts), args, accelerator
        )
        sharded = gradient(
            shard(copy.deepcopy(policy)), shard(copy.deepcopy(reference)), given_samples(None, mine), args, accelerator
        )
        assert whole.keys() == sharded.keys()
        for name in whole:
            torch.testing.assert_close(sharded[name], whole[name], rtol=1e-3, atol=1e-5)
        assert max(g.abs().max() for g in whole.values()) > 1e-2
        accelerator.print(f"{args.kl_estimator}: equal")


CHECKS = {
    "stable_po": check_stable_po,
    "sspo": partial(check_sspo, removal="hidden_states"),
    "sspo_text": partial(check_sspo, removal="text"),
    "soft_po": check_soft_po,
}


def run(world: Path, out: Path, scenario: str) -> None:
    assert PartialState(cpu=True, backend="gloo").num_processes == 2
    CHECKS[scenario](world)
    (out / f"{scenario}_{PartialState().process_index}").touch()
