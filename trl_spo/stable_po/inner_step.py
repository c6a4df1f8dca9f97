# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
The lower level's steps of gradient descent, on the weights of the model itself.

They are taken in place, and taken back bit for bit from a copy: calling the model functionally with other weights is
silently wrong under gradient checkpointing, which recomputes with the weights of the module. Gradients are taken by
`torch.autograd.grad` on the module inside DDP or the DeepSpeed engine, whose own hooks would add them to the outer
gradient, and then averaged over the processes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._compat import disable_gradient_checkpointing


# Of a batch: the sum of the negative log-probabilities of its SFT tokens, and their number
SFTLoss = Callable[[nn.Module, dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
Tensors = list[torch.Tensor]


def norm(tensors: Tensors) -> torch.Tensor:
    """Euclidean norm of the tensors taken as one vector."""
    return torch.stack(torch._foreach_norm(tensors)).float().norm() if tensors else torch.zeros(())


def inner_product(left: Tensors, right: Tensors) -> torch.Tensor:
    return sum(((a.float() * b.float()).sum() for a, b in zip(left, right, strict=True)), start=torch.zeros(()))


class InnerStep:
    """
    Moves the trained parameters by steps of the lower level, and back.

    Args:
        model (`nn.Module`):
            The model itself, without DDP or the DeepSpeed engine around it.
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.
        sft_loss (`Callable`):
            `sft_loss(model, batch)` gives the sum of the negative log-probabilities of the SFT tokens of a batch, in nats, and
            their number.
        gradient_checkpointing_kwargs (`dict`, *optional*):
            The trainer's. Reentrant checkpointing cannot give gradients without adding them up, and is left out here.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        sft_loss: SFTLoss,
        gradient_checkpointing_kwargs: dict | None = None,
    ):
        self.model = model
        self.accelerator = accelerator
        self.sft_loss = sft_loss
        self.gradient_checkpointing_kwargs = gradient_checkpointing_kwargs or {}
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        plugin = accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
        self.zero_stage = None if plugin is None else plugin.zero_stage
        self._saved: Tensors | None = None

    # Gradients of the lower level

    def _checkpointing(self) -> AbstractContextManager:
        if self.gradient_checkpointing_kwargs.get("use_reentrant"):
            return disable_gradient_checkpointing(self.model, self.gradient_checkpointing_kwargs)
        return nullcontext()

    def gradient(self, batches: list[dict[str, torch.Tensor]]) -> tuple[Tensors, torch.Tensor]:
        """
        Gradient of the SFT loss, the mean over all SFT tokens of the batches of all processes, and its value.

        Args:
            batches (`list[dict[str, torch.Tensor]]`):
                This process's batches: those of one optimizer step.

        Returns:
            `tuple[list[torch.Tensor], torch.Tensor]`
        """
        gradients, total, tokens = None, 0.0, 0.0
        with self._checkpointing():
            for batch in batches:
                with self.accelerator.autocast():
                    nll, count = self.sft_loss(self.model, batch)
                parts = torch.autograd.grad(nll, self.parameters, allow_unused=True, materialize_grads=True)
                if gradients is None:
                    gradients = list(parts)
                else:
                    torch._foreach_add_(gradients, list(parts))
                total, tokens = total + nll.detach().float(), tokens + count.float()
        return self._mean_over_tokens(gradients, total, tokens)

    def _mean_over_tokens(
        self, sums: Tensors, total: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[Tensors, torch.Tensor]:
        total, tokens = self.accelerator.reduce(torch.stack([total, tokens]), "sum")
        sums = [self.accelerator.reduce(tensor, "sum") for tensor in sums] if self._is_distributed else sums
        torch._foreach_div_(sums, tokens.item())
        return sums, total / tokens

    @property
    def _is_distributed(self) -> bool:
        return self.accelerator.num_processes > 1

    def hessian_product(
        self, batches: list[dict[str, torch.Tensor]], vectors: Tensors, exact_loss: SFTLoss
    ) -> Tensors:
        """
        `∇²L_SFT v` by double backward, at the weights as they are.

        Args:
            batches (`list[dict[str, torch.Tensor]]`):
                As in [`~InnerStep.gradient`].
            vectors (`list[torch.Tensor]`):
                `v`, one tensor for each parameter, equal on all processes.
            exact_loss (`Callable`):
                As `sft_loss`, but of operations that can be differentiated twice.

        Returns:
            `list[torch.Tensor]`
        """
        products, total, tokens = None, torch.zeros((), device=self.accelerator.device), 0.0
        # The fused attention kernels have no double backward
        with self._checkpointing(), sdpa_kernel(SDPBackend.MATH):
            for batch in batches:
                with self.accelerator.autocast():
                    nll, count = exact_loss(self.model, batch)
                first = torch.autograd.grad(
                    nll, self.parameters, create_graph=True, allow_unused=True, materialize_grads=True
                )
                along = sum((g * v).sum() for g, v in zip(first, vectors, strict=True))
                parts = torch.autograd.grad(along, self.parameters, allow_unused=True, materialize_grads=True)
                if products is None:
                    products = list(parts)
                else:
                    torch._foreach_add_(products, list(parts))
                tokens = tokens + count.float()
        return self._mean_over_tokens(products, total, tokens)[0]

    def difference_product(self, batches: list[dict[str, torch.Tensor]], vectors: Tensors) -> Tensors:
        """`∇²L_SFT v` by a central difference of the gradient along `v`, at the weights as they are."""
        length = norm(vectors)
        if length == 0:
            return [torch.zeros_like(vector) for vector in vectors]
        epsilon = (1e-4 * norm(self.parameters) / length).item()
        with self.saved():
            self.move(vectors, epsilon)
            ahead, _ = self.gradient(batches)
        with self.saved():
            self.move(vectors, -epsilon)
            behind, _ = self.gradient(batches)
        torch._foreach_sub_(ahead, behind)
        torch._foreach_div_(ahead, 2 * epsilon)
        return ahead

    # What this process holds: the parameters, or under ZeRO-3 its own share of each

    def _own(self, parameter: nn.Parameter) -> torch.Tensor:
        """What this process holds of a parameter, to read and to write; [`~InnerStep._wrote`] comes after writing."""
        if self.zero_stage != 3:
            return parameter.data
        return parameter.ds_tensor.view(-1)[: self._share(parameter)[1]]

    def _part(self, parameter: nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
        """That of a whole tensor which belongs to what this process holds of a parameter."""
        if self.zero_stage != 3:
            return tensor
        start, length = self._share(parameter)
        return tensor.flatten()[start : start + length].to(parameter.ds_tensor.device)

    @staticmethod
    def _share(parameter: nn.Parameter) -> tuple[int, int]:
        size = parameter.ds_tensor.numel()
        start = parameter.ds_zero_partition_rank * size
        return start, max(0, min(size, parameter.ds_numel - start))  # the last processes' shares are padded

    def _wrote(self, parameter: nn.Parameter) -> None:
        # ZeRO-3 keeps a small parameter whole, and others for a while; the order in which it fetches them counts on that
        if self.zero_stage == 3 and parameter.ds_status.name == "AVAILABLE":
            parameter.ds_active_sub_modules.clear()  # else it would not be partitioned again
            parameter.partition()
            parameter.all_gather()

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, "sum") if self.zero_stage == 3 else value

    # Steps

    @torch.no_grad()
    def norm(self) -> torch.Tensor:
        """Norm of the trained parameters."""
        own = norm([self._own(parameter) for parameter in self.parameters])
        return self._sum(own.to(self.accelerator.device).square()).sqrt()

    @torch.no_grad()
    def move(self, direction: Tensors, scale: float) -> None:
        """`θ <- θ + scale · direction`, in the weights that the model computes with."""
        for parameter, tensor in zip(self.parameters, direction, strict=True):
            self._own(parameter).add_(self._part(parameter, tensor).to(parameter.dtype), alpha=scale)
            self._wrote(parameter)

    @torch.no_grad()
    def share_that_moves(self, direction: Tensors, scale: float) -> float:
        """Share of the elements of low-precision parameters with a direction that [`~InnerStep.move`] would change."""
        counts = torch.zeros(2, device=self.accelerator.device)
        for parameter, tensor in zip(self.parameters, direction, strict=True):
            if parameter.dtype.itemsize >= 4:
                continue
            own, part = self._own(parameter), self._part(parameter, tensor)
            moves = own.add(part.to(parameter.dtype), alpha=scale) != own
            counts += torch.stack([moves.sum(), (part != 0).sum()]).to(counts)
        moved, total = self._sum(counts).tolist()
        return moved / total if total else 1.0

    @torch.no_grad()
    def move_for_good(self, direction: Tensors, scale: float) -> None:
        """As [`~InnerStep.move`], and in the master weights too, from which DeepSpeed's next step goes on."""
        if self.zero_stage is None:
            return self.move(direction, scale)
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_local_fp32_param,
            safe_set_full_fp32_param,
            safe_set_local_fp32_param,
        )

        for parameter, tensor in zip(self.parameters, direction, strict=True):
            if self.zero_stage == 3:  # not by the functions of the whole parameter, which fail if it is padded
                part = self._part(parameter, tensor)
                master = safe_get_local_fp32_param(parameter).clone()
                master[: part.numel()] += scale * part.to(master)
                safe_set_local_fp32_param(parameter, master)
                self._own(parameter).copy_(master[: part.numel()])
            else:
                master = safe_get_full_fp32_param(parameter)
                master = master.to(tensor.device) + scale * tensor.float().view_as(master)
                safe_set_full_fp32_param(parameter, master)
                parameter.copy_(master)
            self._wrote(parameter)

    # The way back

    @property
    def is_away(self) -> bool:
        """Whether the weights are not those of the last [`~InnerStep.save`]."""
        return self._saved is not None

    @torch.no_grad()
    def save(self) -> None:
        """Keeps a copy of the weights."""
        if self._saved is not None:
            raise RuntimeError("The weights are saved already; restore them first.")
        self._saved = [self._own(parameter).clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Brings back the weights of the last [`~InnerStep.save`], bit for bit."""
        if self._saved is None:
            return
        for parameter, saved in zip(self.parameters, self._saved, strict=True):
            self._own(parameter).copy_(saved)
            self._wrote(parameter)
        self._saved = None

    def stay(self) -> None:
        """Forgets the weights of the last [`~InnerStep.save`]: there is no way back."""
        self._saved = None

    @contextmanager
    def back_home(self) -> Iterator[None]:
        """The weights of the last [`~InnerStep.save`] for the block, and then those of now again."""
        home, self._saved = self._saved, None
        self.save()
        away, self._saved = self._saved, home
        self.restore()
        try:
            yield
        finally:
            self._saved = away
            self.restore()
            self._saved = home

    @contextmanager
    def saved(self) -> Iterator[None]:
        """The weights are those of before again, however the block is left."""
        self.save()
        try:
            yield
        finally:
            self.restore()
