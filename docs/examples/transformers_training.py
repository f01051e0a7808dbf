"""Trains a causal model of transformers with each way to compute its loss: tokens/s, peak memory, and the losses.

python docs/examples/transformers_training.py --model qwen2.5-1.5b gemma-2-2b --loss stock cce liger apple

Nothing is downloaded: weights are random, made on the device, and tokens are drawn on the spot. `cce` is
torchtune_lce.transformers.patch, `liger` the loss alone of what liger-kernel patches, `apple` the patch of
cut-cross-entropy. Each run is a process of its own, so that no patch is left for the next; they import at once and run
one after the other. A CPU takes the tiny models.
"""

import argparse
import importlib
import inspect
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from torchtune_lce.commands.shared import environment
from torchtune_lce.transformers import patch

# What Qwen/Qwen2.5-1.5B and google/gemma-2-2b say in their config.json, as far as it is size.
MODELS = {
    "qwen2.5-1.5b": (
        "Qwen2",
        {
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "attn_implementation": "sdpa",
        },
    ),
    "gemma-2-2b": (
        "Gemma2",
        {
            "vocab_size": 256_000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "final_logit_softcapping": 30.0,
            # PyTorch's attention has none of its caps.
            "attn_implementation": "eager",
        },
    ),
}
_TINY = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MODELS["tiny-qwen2"] = ("Qwen2", {**MODELS["qwen2.5-1.5b"][1], **_TINY, **_HEADS})
MODELS["tiny-gemma-2"] = ("Gemma2", {**MODELS["gemma-2-2b"][1], **_TINY, **_HEADS, "head_dim": 8})


@dataclass(frozen=True)
class Settings:
    batch: int
    sequence: int
    steps: int
    warmup: int
    checkpointing: bool
    learning_rate: float
    filter_eps: str | None
    seed: int


class NotRunError(Exception):
    """Why a loss cannot be had here, in one sentence."""


def stock(model: nn.Module, settings: Settings) -> None:
    """The class's own."""


def cce(model: nn.Module, settings: Settings) -> None:
    patch(model, filter_eps=settings.filter_eps)


def liger(model: nn.Module, settings: Settings) -> None:
    package = _their_package("liger_kernel.transformers")
    apply = getattr(package, f"apply_liger_kernel_to_{model.config.model_type}")
    kernels = [name for name in inspect.signature(apply).parameters if name != "model"]
    # Its rotary embedding, norms and MLPs would not be the loss's merit.
    apply(model=model, **{name: name == "fused_linear_cross_entropy" for name in kernels})


def apple(model: nn.Module, settings: Settings) -> None:
    _their_package("cut_cross_entropy.transformers").cce_patch(model, filter_eps=settings.filter_eps)


LOSSES = {loss.__name__: loss for loss in (stock, cce, liger, apple)}
THEIRS = ("liger", "apple")


def _their_package(name: str):
    try:
        found = importlib.import_module(name)
    except ImportError as error:
        what = _one_line(error).partition(" (/")[0]  # without a path of this machine
        raise NotRunError(f"{name} does not import: {what}") from None
    if not torch.cuda.is_available():
        raise NotRunError(f"the kernels of {name} need a CUDA card, and there is none")
    return found


def build(name: str, device: torch.device, seed: int) -> nn.Module:
    kind, sizes = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**sizes, use_cache=False)
    torch.manual_seed(seed)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.train()


def batches(settings: Settings, vocabulary: int, device: torch.device) -> list[Tensor]:
    """[B, S] a step: tokens as frequent as a language's words, by Zipf's law, so that there is something to learn."""
    generator = torch.Generator().manual_seed(settings.seed)
    frequencies = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    count = (settings.warmup + settings.steps) * settings.batch * settings.sequence
    drawn = frequencies.multinomial(count, replacement=True, generator=generator)
    return list(drawn.view(-1, settings.batch, settings.sequence).to(device))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> tuple[float, bool]:
    """The loss, which has waited for the card, and whether there were logits; nothing else outlives the step."""
    result = model(input_ids=tokens, labels=tokens)
    result.loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return result.loss.item(), result.logits is not None


def train(model_name: str, loss_name: str, settings: Settings) -> dict:
    """Median seconds of a step after the warm-up, the peak of allocated bytes there, and the loss of every step."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    model = build(model_name, device, settings.seed)
    LOSSES[loss_name](model, settings)
    if settings.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)
    losses, seconds = [], []
    for number, tokens in enumerate(batches(settings, model.config.vocab_size, device)):
        if cuda and number == settings.warmup:
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        loss, logits_were_made = step(model, optimizer, tokens)
        seconds.append(time.perf_counter() - begin)
        losses.append(loss)
        if logits_were_made and loss_name != "stock":
            raise NotRunError("its forward made logits all the same, for the class's own loss")
    step_seconds = statistics.median(seconds[settings.warmup :])
    return {
        "tokens_per_second": settings.batch * settings.sequence / step_seconds,
        "step_seconds": step_seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "losses": losses,
    }


def run(to_parent: Connection, model_name: str, loss_name: str, settings: Settings) -> None:
    """In a process of its own, which says that it has imported everything and waits for its turn."""
    transformers.logging.set_verbosity_error()
    getattr(transformers, f"{MODELS[model_name][0]}ForCausalLM")  # imports it
    to_parent.send({"ready": True})
    to_parent.recv()
    try:
        found = train(model_name, loss_name, settings)
    except (NotRunError, torch.OutOfMemoryError) as error:
        found = {"not_run": _one_line(error)}
    except Exception as error:  # what another package cannot do with this transformers is told in its row
        if loss_name not in THEIRS:
            raise
        found = {"not_run": f"{type(error).__name__}: {_one_line(error)}"}
    to_parent.send(found)


def run_all(pairs: list[tuple[str, str]], settings: Settings) -> list[dict]:
    """What :func:`train` found of each model and loss, or ``not_run`` and why."""
    context = multiprocessing.get_context("spawn")
    started = []
    for pair in pairs:
        ours, theirs = context.Pipe()
        process = context.Process(target=run, args=(theirs, *pair, settings), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    heard = [_hear(process, connection) for process, connection in started]
    found = []
    for (model, loss), (process, connection), said in zip(pairs, started, heard, strict=True):
        if "ready" in said:
            connection.send("go")
            said = _hear(process, connection)
        process.join()
        found.append({"model": model, "loss": loss, **said})
    return found


def _hear(process: multiprocessing.Process, connection: Connection) -> dict:
    try:
        return connection.recv()
    except EOFError:
        process.join()
        return {"failed": f"its process ended with exit code {process.exitcode}"}


def compare_with_stock(runs: list[dict]) -> None:
    """Adds to every run the largest difference of a step's loss from stock's, where there is one."""
    stock_losses = {run["model"]: run["losses"] for run in runs if run["loss"] == "stock" and "losses" in run}
    for run in runs:
        if "losses" in run and run["model"] in stock_losses:
            pairs = zip(run["losses"], stock_losses[run["model"]], strict=True)
            run["largest_difference_from_stock"] = max(abs(mine - own) for mine, own in pairs)


def table(runs: list[dict]) -> str:
    lines = ["| model | loss | tokens/s | peak GiB | loss of the last step | largest difference from stock's |"]
    lines.append("|---|---|---|---|---|---|")
    for run in runs:
        cells = [run["model"], run["loss"]]
        if "losses" not in run:
            cells += [run.get("not_run") or run["failed"], "", "", ""]
        else:
            apart, peak = run.get("largest_difference_from_stock"), run["peak_bytes"]
            cells += [
                f"{run['tokens_per_second']:,.0f}",
                "" if peak is None else f"{peak / 2**30:.2f}",
                f"{run['losses'][-1]:.4f}",
                "" if apart is None else f"{apart:.1e}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["qwen2.5-1.5b"])
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of each row of the batch")
    parser.add_argument("--steps", type=int, default=10, help="those measured")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of every layer")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--filter-eps", choices=("auto", "none"), default="auto", help="of cce and apple")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for all that was found")
    asked = vars(parser.parse_args())
    if asked["steps"] < 1 or asked["warmup"] < 0:
        parser.error("--steps must be at least 1, --warmup at least 0")
    models, losses, output = asked.pop("model"), asked.pop("loss"), asked.pop("output")
    settings = Settings(**{**asked, "filter_eps": None if asked["filter_eps"] == "none" else "auto"})
    runs = run_all([(model, loss) for model in models for loss in losses], settings)
    compare_with_stock(runs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = {**environment.describe(device), "transformers": transformers.__version__}
    if output is not None:
        output.write_text(json.dumps({"environment": setting, "settings": asdict(settings), "runs": runs}, indent=1))
    print(f"{settings.batch} x {settings.sequence} tokens a step, bfloat16; {environment.in_words(setting)}")
    print(table(runs))
    return int(any("failed" in run for run in runs))


if __name__ == "__main__":
    sys.exit(main())
