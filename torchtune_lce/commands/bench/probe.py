"""A small language model, trained on the spot: its hidden states and head are what a loss meets in real training."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtune_lce.commands.shared.batches import Batch
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.shapes import Shape
from torchtune_lce.commands.shared.short_training import Schedule, train

_HEAD = 128  # features of an attention head
_CHUNK = 2048  # tokens whose logits are held at once while training


@dataclass(frozen=True)
class Training(Schedule):
    """Passes over the text are what makes the softmax as peaked as in fine-tuning: four of them with these numbers."""

    layers: int = 6
    sequence: int = 1024
    million_tokens: float = 3.7
    held_out: int = 64  # sequences that are never trained on

    def characters(self) -> int:
        """Enough text: a token of source code and documentation has three to four."""
        return int(self.million_tokens * 4e6)


class _Block(nn.Module):
    """Causal attention with rotary positions, then a gated MLP, each behind a norm and beside a residual."""

    def __init__(self, features: int):
        super().__init__()
        self.heads = max(features // _HEAD, 1)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(features), nn.RMSNorm(features)
        self.query_key_value = nn.Linear(features, 3 * features, bias=False)
        self.attention_out = nn.Linear(features, features, bias=False)
        self.gate_up = nn.Linear(features, 4 * features, bias=False)
        self.down = nn.Linear(2 * features, features, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, S, D]; cos, sin [S, D / heads / 2]
        split = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            _rotated(query, cos, sin), _rotated(key, cos, sin), value, is_causal=True
        )
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1).to(x.dtype)


class Probe(nn.Module):
    """A decoder without its head's product: ``forward`` returns the hidden states after the last norm, [B, S, D]."""

    def __init__(self, vocab: int, features: int, layers: int, sequence: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab, features)
        self.head = nn.Linear(features, vocab, bias=False)
        self.norm = nn.RMSNorm(features)
        self.blocks = nn.ModuleList(_Block(features) for _ in range(layers))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        half = features // self.blocks[0].heads // 2
        angle = torch.outer(torch.arange(sequence).float(), 10_000 ** -(torch.arange(half).float() / half))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.norm(x)


class _ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy in plain PyTorch, its gradients made in the forward, chunk by chunk.

    Not one of the losses that are measured afterwards: none of them may choose its own data.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), _CHUNK):
            part, labels = hidden[start : start + _CHUNK], targets[start : start + _CHUNK]
            rows = torch.arange(len(part), device=part.device)
            logits = (part @ weight.T).float()
            lse = logits.logsumexp(-1)
            total += (lse - logits[rows, labels]).sum()
            d_logits = logits.sub_(lse[:, None]).exp_()
            d_logits[rows, labels] -= 1
            d_logits = (d_logits / len(hidden)).to(hidden.dtype)
            d_hidden[start : start + _CHUNK] = d_logits @ weight
            d_weight += (d_logits.T @ part).float()
        ctx.save_for_backward(d_hidden, d_weight)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return upstream * d_hidden, (upstream * d_weight).to(d_hidden.dtype), None


def probe_batches(
    tokens: Tensor,  # [T] int64, of the text
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    training: Training,
    on_step: Callable[[int, float], None],
) -> list[Batch]:
    """Trains on ``tokens``, telling ``on_step`` the step and its loss, and returns what a loss sees of two texts.

    "probe train" is of tokens that it has seen, "probe val" of tokens that it has not. Raises CommandError where there
    is too little text or the sizes do not go together.
    """
    sequences = -(-shape.tokens // training.sequence)
    rows = tokens[: len(tokens) // (training.sequence + 1) * (training.sequence + 1)].view(-1, training.sequence + 1)
    held_out = max(training.held_out, sequences)
    if len(rows) < held_out + max(training.batch, sequences):
        raise CommandError(
            f"the probe needs {held_out + max(training.batch, sequences)} sequences of {training.sequence} tokens, the "
            f"text on this machine gives {len(rows)}; take fewer --tokens"
        )
    if shape.hidden % _HEAD and (shape.hidden > _HEAD or shape.hidden % 2):
        raise CommandError(f"the probe's hidden size must be a multiple of {_HEAD}, got {shape.hidden}")
    seen, unseen = rows[:-held_out], rows[-held_out:]
    torch.manual_seed(0)
    with device:
        model = Probe(shape.vocab, shape.hidden, training.layers, training.sequence)
    _train(model, seen, device, training, on_step)
    weight = model.head.weight.detach().to(dtype)
    batches = []
    for name, part in (("probe train", seen), ("probe val", unseen)):
        part = part[:sequences].to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            hidden = torch.cat([model(row[None, :-1]) for row in part]).flatten(0, 1)
        targets = part[:, 1:].reshape(-1)
        batches.append(
            Batch("file", name, hidden[: shape.tokens].to(dtype), weight, targets[: shape.tokens].contiguous())
        )
    return batches


def _train(
    model: Probe, rows: Tensor, device: torch.device, training: Training, on_step: Callable[[int, float], None]
) -> None:
    run = torch.compile(model) if device.type == "cuda" else model
    embedding = model.embedding.weight
    others = [parameter for parameter in model.parameters() if parameter is not embedding]
    # An embedding row gets few gradients, so larger steps.
    groups = [{"params": others}, {"params": [embedding], "scale": 3.0}]

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            hidden = run(batch[:, :-1])
        return _ChunkedLoss.apply(
            hidden.flatten(0, 1).bfloat16(), model.head.weight.bfloat16(), batch[:, 1:].reshape(-1)
        )

    train(groups, rows, device, training, loss_of, on_step)
