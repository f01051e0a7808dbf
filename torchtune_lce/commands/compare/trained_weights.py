"""Weights that have learnt, made once for all runs of a comparison.

How much of the softmax a filtering loss leaves out, and so its speed, is decided by what the model knows. Embedding,
head, last norm and the first two decoder layers of the config's model are trained here as a model of their own, and
:mod:`identity_layers` makes the deep model of them: it computes as much as any, with a softmax that has learnt.

- Two layers are the fewest that look up what followed the same words earlier in their context, which is most of what
  there is to know of source code.
- The text is what ``--demo-data`` leaves over: no file of it is in the rows of the fine-tune, whose loss is therefore a
  held-out one. Its ``--vocabulary`` entries are spread over the model's; the softmax pushes the others down, as it does
  in a real model with the entries of other languages.
- AdamW on float32 weights, products in bfloat16 on a card, for some seconds or four passes over the text.
- The loss is not one that filters: none may choose the data that it is measured on, and entries that no text has would
  be left where they began.

On a card at Gemma 2 2B's 256,000 x 2,304 a step of 8,192 tokens is 3.7e13 operations, 80% of them the head's, and
16 bytes of each of 0.75 billion parameters.
"""

import json
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from torchtune_lce.commands.compare.demo_data import DemoData, rows_and_rest
from torchtune_lce.commands.compare.identity_layers import first_layers
from torchtune_lce.commands.shared import records
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.random_weights import random_state
from torchtune_lce.commands.shared.short_training import Schedule, train
from torchtune_lce.implementations import choice
from torchtune_lce.loss import LinearCrossEntropyLoss

LAYERS = 2
SECONDS_ON_A_CARD, SECONDS_ELSEWHERE = 75, 20
_WEIGHTS, _MADE = "weights.pt", "made.json"
_PASSES = 4
_HELD_OUT_TOKENS = 16_384


@dataclass(frozen=True)
class Learnt:
    """What the training came to; ``held_out_loss`` is that of the first rows of the fine-tune."""

    layers: int
    impl: str  # of the loss
    steps: int
    tokens: int
    seconds: float
    held_out_loss: float

    def __str__(self) -> str:
        return (
            f"trained weights: {self.layers} layers, the others idle, {self.steps:,} steps, "
            f"{self.tokens / 1e6:.2f} million tokens, {self.seconds:.0f} s, impl '{self.impl}'; held-out loss "
            f"{self.held_out_loss:.3f}"
        )


@dataclass(frozen=True)
class TrainedWeights:
    """What to make, for the section ``model`` of a config, in ``dtype``."""

    model: DictConfig
    data: DemoData
    dtype: torch.dtype
    device: torch.device
    seconds: float

    def checkpointer(self, folder: Path, learnt: Learnt) -> dict:
        """The settings of a checkpointer that loads them, with what tells them from others in the same place."""
        return {
            "_component_": "torchtune_lce.commands.compare.checkpointers.Deepened",
            "model": "${model}",
            "path": str(folder / _WEIGHTS),
            "learnt": asdict(learnt),
        }

    def made_before(self, folder: Path) -> Learnt | None:
        """What an earlier call with the same settings has left there."""
        stored = records.read(folder / _MADE)
        if stored is None or stored["key"] != self._key() or not (folder / _WEIGHTS).exists():
            return None
        return Learnt(**stored["learnt"])

    def make(self, folder: Path, data_folder: Path, on_step: Callable[[int, float], None]) -> Learnt:
        """Trains them, in a process whose memory on the card ends with it, and writes them into ``folder``.

        ``on_step`` is told the step and its loss now and then. Raises CommandError if it fails.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MADE).unlink(missing_ok=True)
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_make, args=(sender, self, folder / _WEIGHTS, data_folder), daemon=True)
        process.start()
        sender.close()
        try:
            while isinstance(told := receiver.recv(), tuple):
                on_step(*told)
        except EOFError as error:  # it ended without a word
            process.join()
            raise CommandError(
                f"--trained-weights: the training ended with status {process.exitcode}, see above"
            ) from error
        finally:
            process.terminate()
            process.join()
        if isinstance(told, CommandError):
            raise told
        records.write({"key": self._key(), "learnt": asdict(told)}, folder / _MADE)
        return told

    def _key(self) -> dict:
        """All that they depend on, as JSON gives it back."""
        key = {
            "model": OmegaConf.to_container(self.model, resolve=True),
            "data": asdict(self.data),
            "dtype": str(self.dtype),
            "device": self.device.type,
            "seconds": self.seconds,
        }
        return json.loads(json.dumps(key))


def _make(sender: Connection, wanted: TrainedWeights, path: Path, data_folder: Path) -> None:
    """In a process of its own: sends a step and its loss, again and again, and at last what the training came to."""
    try:
        rows, rest = rows_and_rest(data_folder)
        state, learnt = learn(wanted, rows, rest, lambda step, loss: sender.send((step, loss)))
        torch.save(state, path)
        sender.send(learnt)
    except CommandError as error:
        sender.send(error)
    except torch.OutOfMemoryError as error:
        said = str(error).splitlines()[0]
        sender.send(CommandError(f"--trained-weights: the training needs more memory than the card has: {said}"))


def learn(
    wanted: TrainedWeights,
    rows: Tensor,  # [R, S], what is fine-tuned on
    rest: Tensor,  # [T], the text to train on
    on_step: Callable[[int, float], None],
) -> tuple[dict[str, Tensor], Learnt]:
    """The state dict of the first layers, on the CPU in the wanted dtype, and what was done.

    Raises CommandError for a model or a text that does not do.
    """
    begin, device = time.perf_counter(), wanted.device
    sequence = rows.shape[1]
    batch = max((8192 if device.type == "cuda" else 512) // sequence, 1)
    examples = rest[: len(rest) // (sequence + 1) * (sequence + 1)].view(-1, sequence + 1)
    if len(examples) < batch:
        raise CommandError(
            f"--trained-weights: a step takes {batch} rows of {sequence + 1} tokens, the text that --demo-data leaves "
            f"over has {len(examples)}; take fewer --steps or a smaller batch_size"
        )
    model = _on_device(first_layers(wanted.model, LAYERS), device)
    impl = choice.automatic(device, torch.bfloat16)[0]
    loss_fn = LinearCrossEntropyLoss(impl="cce_exact" if impl == "cce" else impl)
    loss_fn.set_model_output(model)

    def loss_of(tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return loss_fn(model(tokens[:, :-1]), tokens[:, 1:])

    schedule = Schedule(
        batch=batch,
        steps=_PASSES * (len(examples) // batch),
        seconds=wanted.seconds,
        learning_rate=1e-3 if device.type == "cuda" else 3e-3,
        warmup=50 if device.type == "cuda" else 10,
    )
    steps = train([{"params": list(model.parameters())}], examples, device, schedule, loss_of, on_step)
    learnt = Learnt(
        layers=len(model.layers),
        impl=loss_fn.impl,
        steps=steps,
        tokens=steps * batch * sequence,
        seconds=round(time.perf_counter() - begin, 1),
        held_out_loss=_mean(loss_of, rows[: math.ceil(_HELD_OUT_TOKENS / sequence)].split(batch), device),
    )
    loss_fn.release()
    return {name: tensor.detach().to("cpu", wanted.dtype) for name, tensor in model.state_dict().items()}, learnt


def _on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """A model of the meta device with random weights, which are drawn on ``device``, and its positions."""
    state = {name: tensor.to(device) for name, tensor in random_state(model, device=device).items()}
    model.load_state_dict(state, assign=True)
    with device:
        for module in model.modules():
            if hasattr(module, "rope_init"):  # torchtune's own way, since no checkpoint has positions
                module.rope_init()
    return model


@torch.no_grad()
def _mean(loss_of: Callable[[Tensor], Tensor], batches: tuple[Tensor, ...], device: torch.device) -> float:
    """Of all tokens: the last of the batches may be smaller."""
    total = sum(len(batch) * loss_of(batch.to(device)).item() for batch in batches)
    return total / sum(map(len, batches))
