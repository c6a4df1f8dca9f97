# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
The KL regularizer on models that FSDP2 shards: `fsdp2_script.py WORLD`, two processes.

Accelerate does not admit FSDP2 on the CPU, so the models are sharded here by hand, with PyTorch's `fully_shard`, as
Accelerate would. Each process compares its gradient with that of the whole model on all samples.
"""

import copy
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from soft_po_script import given_samples
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from trl_spo import SoftPOConfig
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


def main(world: Path) -> None:
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
    accelerator.end_training()  # else Gloo's threads may abort the process while it exits


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
