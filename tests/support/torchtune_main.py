"""What torchtune's main branch asks of a loss and a model, for machines that have the 0.6.1 release.

Written from its behaviour, not from its text: main cannot be installed beside the release, and needs a torchao that the
release does not import with.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental._attention import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)
from torchtune import config
from torchtune.modules import TransformerDecoder


class SFTLoss(ABC):
    """Every member that main's recipes use. They ask for it with isinstance."""

    def apply_compile_strategy(self, *args, **kwargs):
        self.forward = torch.compile(self.forward, *args, **kwargs)
        return self

    @abstractmethod
    def set_model_output(self, model: nn.Module) -> None: ...

    @abstractmethod
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor: ...

    @property
    def tp_requires_loss_parallel_ctx_manager(self) -> bool:
        return False

    def patch_tp_plan(self, tp_plan: dict) -> dict:
        return tp_plan


class MainDecoder(TransformerDecoder):
    """torchtune's decoder with the switch that its main branch has, and the release has not."""

    skip_output_layer = False

    def unembed(self, h):
        h = self.norm(h)
        return h if self.skip_output_layer else self.output(h).float()


def as_on_main(model: TransformerDecoder) -> TransformerDecoder:
    """The same model, of main's class."""
    model.__class__ = MainDecoder
    return model


def training_tp_plan(tied: bool) -> dict[str, ParallelStyle]:
    """Main's layout for training: between the products, activations are split along the sequence."""
    # Main names the first input of an attention alone and leaves the second, which is the same tensor, to DTensor;
    # torch 2.11 refuses that.
    whole = PrepareModuleInput(input_layouts=(Shard(1),) * 2, desired_input_layouts=(Replicate(),) * 2)
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "layers.*.sa_norm": SequenceParallel(),
        "layers.*.mlp_norm": SequenceParallel(),
        "layers.*.attn": whole,
        "layers.*.mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    }
    for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.w1", "mlp.w3"):
        plan[f"layers.*.{name}"] = ColwiseParallel()
    for name in ("attn.output_proj", "mlp.w2"):
        plan[f"layers.*.{name}"] = RowwiseParallel(output_layouts=Shard(1))
    if not tied:
        plan["output"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    return plan


@contextmanager
def context_parallel_manager(mesh: DeviceMesh, model: nn.Module, inputs: list[Tensor]) -> Iterator[None]:
    """Around forward, loss and backward: inputs [B, S] and the model's tables of positions become this rank's part.

    In place, and restored for the tables only. The order of a sequence changes too, so that all ranks attend as much.
    """
    tables = [table for name, table in model.named_buffers() if name.endswith("cache")]
    with context_parallel(
        mesh,
        buffers=[*inputs, *tables],
        buffer_seq_dims=[1] * len(inputs) + [0] * len(tables),
        no_restore_buffers=set(inputs),
    ):
        yield


class MainRecipe:
    """Main's fine-tuning on one device, down to what it says to the loss and the model, in its order."""

    def __init__(self, interface: type, model: nn.Module, cfg: DictConfig):
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        self.loss = config.instantiate(cfg.loss)
        self._interface = interface
        if isinstance(self.loss, interface):
            self.loss.set_model_output(model)
        if cfg.compile:
            # Layer by layer, and of the loss what it says itself; most recipes drop what it returns.
            for layer in model.layers:
                layer.compile(backend="eager")
            self.loss.apply_compile_strategy(backend="eager")

    def train(self, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
        """One step a batch of tokens and labels [B, S], which main's data set has shifted; the losses."""
        losses = []
        for tokens, labels in batches:
            count = (labels != self.loss.ignore_index).sum()
            running = self._loss_step(tokens, labels) * count
            running.backward()
            for parameter in self.model.parameters():
                parameter.grad.mul_(1 / count)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append((running / count).item())
        return losses

    @torch.no_grad()
    def validate(self, batches: list[tuple[Tensor, Tensor]]) -> float:
        self.model.eval()
        total = sum(self._loss_step(*batch) * (batch[1] != self.loss.ignore_index).sum() for batch in batches)
        self.model.train()
        return (total / sum((labels != self.loss.ignore_index).sum() for _, labels in batches)).item()

    def _loss_step(self, tokens: Tensor, labels: Tensor) -> Tensor:
        outputs = self.model(tokens)
        if not isinstance(self.loss, self._interface):
            labels, outputs = labels.reshape(-1), outputs.reshape(-1, outputs.shape[-1])
        return self.loss(outputs, labels)
