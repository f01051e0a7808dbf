"""What trains models of transformers around the patch: Trainer and PEFT."""

import logging

import pytest
import torch

pytest.importorskip("transformers")

from tiny_transformers import assert_same, batch, build, step

from torchtune_lce.transformers import patch, unpatch


def losses_of_a_run(model, folder) -> list[float]:
    from transformers import Trainer, TrainingArguments

    rows = [{name: value[i] for name, value in batch(seed).items()} for seed in range(8) for i in range(2)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=4,
        logging_steps=1,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    return [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history[:-1]]


def test_trainer_with_gradient_accumulation(tmp_path):
    pytest.importorskip("accelerate")
    own = losses_of_a_run(build("Llama"), tmp_path)
    model = patch(build("Llama"))
    ours = losses_of_a_run(model, tmp_path)
    assert len(own) == 6
    assert own[0] - own[-1] > 0.1
    assert ours == pytest.approx(own, abs=2e-4)
    # The run ended with an evaluation.
    assert step(model.train())[0].logits is None


LORA = {
    "layers": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head with a bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def with_lora(model, **settings):
    peft = pytest.importorskip("peft")
    try:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.25, task_type="CAUSAL_LM", **settings))
    except ImportError as error:
        pytest.skip(f"this peft refuses this torchao: {error}")
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("case", LORA)
def test_lora(case, caplog):
    # A bias of the head, for that of the adapter to be added to.
    model = with_lora(build("Phi" if "bias" in case else "Llama"), **LORA[case])
    torch.manual_seed(5)
    own, expected = step(model)
    patch(model)
    caplog.set_level(logging.WARNING, "torchtune_lce.transformers")
    torch.manual_seed(5)
    result, got = step(model)
    assert result.logits is None
    assert_same(got, expected)
    assert not [record for record in caplog.records if record.name == "torchtune_lce.transformers"]
    unpatch(model)
    assert step(model)[0].logits is not None


def test_lora_on_the_head_disabled_and_merged():
    model = patch(with_lora(build("Llama"), **LORA["head"]))
    with model.disable_adapter():
        result = model(**batch())
    assert result.logits is None
    torch.testing.assert_close(result.loss, build("Llama")(**batch()).loss, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    result = model(**batch())
    assert result.logits is None
    torch.testing.assert_close(result.loss, unpatch(model)(**batch()).loss, rtol=1e-5, atol=1e-5)


def test_dora_on_the_head_has_whole_logits(caplog):
    """Its magnitude is a factor of each entry: the class's own product is taken."""
    model = with_lora(build("Llama"), target_modules=["lm_head"], use_dora=True)
    torch.manual_seed(5)
    expected = step(model)[1]
    patch(model)
    torch.manual_seed(5)
    got = step(model)[1]
    assert_same(got, expected)
    assert "computes its loss from whole logits" in caplog.text
