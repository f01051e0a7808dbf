"""TRL's SFTTrainer with a patched model: its own loss, which is said, or the patched one by the class in the docs."""

import logging
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("trl")

import trl
from datasets import Dataset
from tiny_transformers import VOCABULARY, batch, build, step
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from torchtune_lce.transformers import patch

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "torchtune_lce.transformers")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "torchtune_lce.transformers"]


@pytest.fixture(scope="module")
def documented() -> type:
    (text,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "from trl" in text)
    names: dict = {}
    exec(compile(text, str(PAGE), "exec"), names)
    return names["ModelLossTrainer"]


def train(model, folder, trainer: type, lora: dict | None = None, **settings):
    """The loss of each micro-batch and of the evaluations, and the model that has been trained."""

    class Recording(trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    losses: list[float] = []
    if lora is not None:
        import peft

        lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **lora)
    words = {f"w{place}": place for place in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    rows = [{name: value[i].tolist() for name, value in batch(seed).items()} for seed in range(8) for i in range(2)]
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=0.05,
        report_to=[],
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **{"loss_type": "nll", **settings},
    )
    torch.manual_seed(0)  # for the adapter's weights
    made = Recording(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2"),
        peft_config=lora,
    )
    made.train()
    evaluations = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    return losses + evaluations, made.model


@pytest.mark.parametrize("lora", [None, {"target_modules": ["q_proj", "v_proj"]}], ids=["whole", "LoRA"])
def test_the_documented_class(lora, documented, tmp_path, said):
    own, _ = train(build("Llama"), tmp_path, trl.SFTTrainer, lora)
    ours, model = train(patch(build("Llama")), tmp_path, documented, lora)
    assert len(own) == 10
    assert abs(own[-2] - own[-1]) > 1e-4
    assert ours == pytest.approx(own, abs=1e-5)
    # Logits, made by whomever, would have been told of.
    assert not said()
    assert step(model.train())[0].logits is None


ROUTED = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}


@pytest.mark.parametrize(
    ("family", "sizes", "settings"),
    [("Llama", {}, {}), ("Llama", {}, {"loss_type": "dft"}), ("Mixtral", ROUTED, {})],
    ids=["nll", "dft", "routed"],
)
def test_its_own_fused_projection(family, sizes, settings, documented, tmp_path, said):
    """TRL's loss, and a sentence; so by the documented class, of what it leaves to TRL."""
    pytest.importorskip("trl", "1.16")
    trainer = trl.SFTTrainer if family == "Llama" and not settings else documented
    own, _ = train(build(family, **sizes), tmp_path, trl.SFTTrainer, **settings)
    ours, _ = train(patch(build(family, **sizes)), tmp_path, trainer, **settings)
    assert ours == pytest.approx(own, abs=1e-5)
    (line,) = said()
    assert line.startswith(f"{family}ForCausalLM trains without the patch: its forward has been replaced since")
