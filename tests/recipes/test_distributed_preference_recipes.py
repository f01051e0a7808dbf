"""Our distributed DPO recipes beside torchtune's own, ten steps really run on two processes: same metrics, checkpoints.

Without `optimizer_in_bwd`, where torchtune's own has no optimizer and crashes, for it asks that for something all the
same; neither recipe knows tensor parallelism.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distributed_processes import RUN_AGAIN_AFTER_A_SIGNAL, spawn, train_all
from tiny_models import FULL_DPO_DISTRIBUTED, LORA_DPO_DISTRIBUTED, build_model
from tiny_preferences import (
    RSO_LOSS,
    assert_equal_checkpoints,
    assert_equal_steps,
    on_output,
    preference_config,
    saved,
    write_pairs,
    write_preference_assets,
)

pytestmark = RUN_AGAIN_AFTER_A_SIGNAL

STEPS = 10
OWN_GROUPS = "custom_sharded_layers=[tok_embeddings,output]"
LAYOUTS = ((), (OWN_GROUPS,), ("fsdp_reshard_after_forward=False",))
SHORT = {LORA_DPO_DISTRIBUTED: "lora", FULL_DPO_DISTRIBUTED: "full"}


@dataclass(frozen=True)
class Case:
    """One run. ``equals``: the run of torchtune's recipe whose figures it must have; None for such a run itself."""

    method: str
    tied: bool
    overrides: tuple[str, ...] = ()
    equals: str | None = None


def _cases() -> dict[str, Case]:
    cases = {}

    def compare(name: str, method: str, tied: bool, overrides: tuple[str, ...] = (), layouts: tuple = ((),)) -> None:
        cases[f"stock {name}"] = Case(method, tied, overrides)
        for layout in layouts:
            cases[" ".join([name, *layout])] = Case(method, tied, (*overrides, *layout), f"stock {name}")

    for method, short in SHORT.items():
        for tied in (True, False):
            # However torchtune shards the model, the numbers are those of one run. Its own recipe crashes where a tied
            # embedding has a group of its own.
            compare(f"{short} {'tied' if tied else 'untied'}", method, tied, layouts=LAYOUTS)
        compare(f"{short} checkpointing", method, True, ("enable_activation_checkpointing=True",))
        compare(f"{short} a rank without labels", method, True, ("batch_size=1", "shuffle=False"))
    accumulated = "gradient_accumulation_steps=2", f"loss._component_={RSO_LOSS}"
    compare("lora accumulation, RSO", LORA_DPO_DISTRIBUTED, True, accumulated)
    compare("full accumulation, clipping, RSO", FULL_DPO_DISTRIBUTED, False, (*accumulated, "clip_grad_norm=0.1"))
    compare("lora on the output", LORA_DPO_DISTRIBUTED, False, layouts=LAYOUTS[:2])
    compare("dora on the output", LORA_DPO_DISTRIBUTED, False, ("model.use_dora=True",))
    return cases


CASES = _cases()
COMPARED = [name for name, case in CASES.items() if case.equals]


class Runs:
    """Runs all cases in one spawn: starting two processes costs more than a run."""

    def __init__(self, folder: Path):
        self.assets = folder / "assets"
        self._folder = folder
        write_preference_assets(self.assets)
        for tied in (True, False):
            # A reference that is not what the policy begins as, so that neither can be taken for the other.
            torch.save(build_model(tied, seed=1).state_dict(), self.assets / f"reference-{tied}.pt")
        truncated, answered = ("Say nothing at all. " * 20, "nothing", "no"), ("Say one", "one, of course", "no")
        # In turn of both ranks.
        self.half = write_pairs(self.assets / "half.jsonl", [truncated, answered] * STEPS)
        spawn(train_all, 2, [self._prepared(name, case) for name, case in CASES.items()])

    def output(self, name: str) -> Path:
        return self._folder / name

    def _prepared(self, name: str, case: Case) -> tuple:
        where = self.assets, self.output(name), case.method
        overrides = "gradient_accumulation_steps=1", *case.overrides
        cfg = preference_config(*where, tied=case.tied, steps=STEPS, overrides=overrides)
        if case.method == FULL_DPO_DISTRIBUTED:
            cfg.ref_checkpointer.checkpoint_files = [f"reference-{case.tied}.pt"]
            # At LoRA's rate all pairs are soon told apart: of losses near 0 equality says little. And AdamW makes of
            # rounding in gradients near zero a share of its rate: of this one, less than 1e-5 in every weight.
            cfg.optimizer.lr = 1e-4
        else:
            # Each of the steps counts.
            cfg.lr_scheduler.num_warmup_steps = 0
        if "a rank without labels" in name:
            cfg.dataset.data_files = str(self.half)
        if "on the output" in name:
            cfg = on_output(cfg)
        return case.equals is not None, case.method, cfg


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch's FSDP2 does not run on a CPU")
    return Runs(tmp_path_factory.mktemp("preferences"))


@pytest.mark.parametrize("name", COMPARED)
def test_steps_equal_stock(runs, name):
    assert_equal_steps(runs.output(name), runs.output(CASES[name].equals), steps=STEPS)


@pytest.mark.parametrize("name", COMPARED)
def test_checkpoint_equals_stock(runs, name):
    adapters = CASES[name].method == LORA_DPO_DISTRIBUTED
    assert_equal_checkpoints(runs.output(name), runs.output(CASES[name].equals), adapters)


@pytest.mark.parametrize("name", ["lora on the output", "dora on the output"])
def test_the_adapter_on_the_output_was_trained(runs, name):
    adapters = saved(runs.output(name))
    assert adapters["output.lora_b.weight"].abs().max() > 1e-3
    assert ("output.magnitude" in adapters) == ("dora" in name)
