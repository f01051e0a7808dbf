"""``tune-lce bench``: its data, its check before timing, its results, and everything but the card's own timer."""

import dataclasses
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from allocations import usage

from torchtune_lce.commands import tune_parser
from torchtune_lce.commands.bench import command, correctness, measure, probe, report, session, text, timing
from torchtune_lce.commands.bench.statistics import softmax_statistics
from torchtune_lce.commands.shared import environment, yardstick
from torchtune_lce.commands.shared.batches import Batch, file_batches, random_batch
from torchtune_lce.commands.shared.candidates import BASELINE, CANDIDATES, Candidate, select
from torchtune_lce.commands.shared.errors import CommandError
from torchtune_lce.commands.shared.shapes import MODELS, Shape, parse_shape
from torchtune_lce.commands.shared.trained_batches import trained_batch
from torchtune_lce.commands.shared.vocabulary import spread
from torchtune_lce.implementations import choice
from torchtune_lce.inputs.filtering import UNFILTERED, Filtering
from torchtune_lce.inputs.options import AUTO_FROZEN, AUTO_TRAINED

CPU = torch.device("cpu")
TINY = Shape(130, 32, 140)
_CARD = torch.cuda.is_available()


# ---- shapes


def test_shapes_by_name_and_in_numbers():
    assert parse_shape("llama3_1_8b", 4096) == Shape(4096, 4096, 128_256)
    assert parse_shape("8192x2048x151936", 1) == Shape(8192, 2048, 151_936)
    assert {"llama3_2_1b", "llama3_1_8b", "qwen2_5_7b", "gemma2_2b"} <= MODELS.keys()
    for wrong in ("llama9", "8192x2048", "8192x0x100"):
        with pytest.raises(CommandError):
            parse_shape(wrong, 8192)


def test_sizes_of_models_are_torchtunes():
    from torchtune.models.gemma2 import gemma2_2b
    from torchtune.models.llama3_2 import llama3_2_1b
    from torchtune.models.qwen2_5 import qwen2_5_7b_base

    for name, build in {"llama3_2_1b": llama3_2_1b, "qwen2_5_7b": qwen2_5_7b_base, "gemma2_2b": gemma2_2b}.items():
        with torch.device("meta"):
            embedding = build().tok_embeddings
        assert (embedding.embedding_dim, embedding.num_embeddings) == MODELS[name]


def test_flops_count_products_of_the_mathematics():
    shape = Shape(2, 3, 5)
    assert [shape.flops(frozen) for frozen in (None, True, False)] == [60, 120, 180]


# ---- data


def test_trained_data_have_the_statistics_of_a_trained_model():
    """At a quarter of the features: the logits' distribution does not depend on them. Fewer row blocks than there
    order by activity better, so that order's fraction is asserted on a card only."""
    found = softmax_statistics(trained_batch(Shape(1024, 512, 151_936), torch.float32, CPU))
    expected = {"loss": 2.1, "entropy": 2.8, "entries": 118, "kept_natural": 0.41, "kept_by_mean_logit": 0.15}
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=0.25)
    assert found.kept_by_active_blocks < 0.6 * found.kept_by_mean_logit


def test_trained_data_of_a_smaller_vocabulary_are_denser_but_as_peaked():
    found = softmax_statistics(trained_batch(Shape(512, 256, 32_000), torch.float32, CPU, seed=1))
    assert (found.entropy, found.entries) == pytest.approx((2.8, 118), rel=0.35)
    assert found.kept_by_active_blocks < found.kept_by_mean_logit < found.kept_natural


@pytest.mark.gpu
def test_trained_data_at_the_size_that_they_were_fitted_to(device):
    found = softmax_statistics(trained_batch(Shape(8192, 2048, 151_936), torch.bfloat16, device))
    expected = {
        "loss": 2.1,
        "entropy": 2.8,
        "entries": 118,
        "kept_natural": 0.41,
        "kept_by_mean_logit": 0.15,
        "kept_by_active_blocks": 0.07,
    }
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=0.25)


def test_random_data():
    batch = random_batch(Shape(256, 64, 4000), torch.float32, CPU)
    logits = batch.hidden @ batch.weight.T
    assert logits.std().item() == pytest.approx(1.28, rel=0.05)
    assert batch.hidden.std().item() == pytest.approx(1, rel=0.05)
    assert softmax_statistics(batch).kept_natural == 1
    assert batch.targets.min() >= 0
    assert batch.targets.max() < 4000


def test_statistics_count_entries_tiles_and_targets():
    """Logits written down by hand: each token likes one entry of the first tile, one is unsure between two."""
    hidden, weight = torch.zeros(200, 4), torch.zeros(300, 4)
    hidden[:, 0] = 1
    weight[5, 0] = 50  # all of the softmax
    hidden[150] = torch.tensor([0.0, 1, 0, 0])
    weight[280, 1] = weight[281, 1] = 50  # half each, in the last tile
    targets = torch.full((200,), 5)
    targets[150] = 280
    targets[20] = 130  # improbable, in the middle tile
    targets[21] = -100
    found = softmax_statistics(Batch("file", "x", hidden, weight, targets))
    log2 = torch.tensor(2.0).log().item()
    assert found.loss == pytest.approx((50 + log2) / 199, abs=1e-4)
    assert found.entropy == pytest.approx(log2 / 200, abs=1e-4)
    assert found.entries == pytest.approx(201 / 200)
    # Two row blocks by three tiles: the first keeps tiles 0 and 1, the second 0 and 2.
    assert found.kept_natural == pytest.approx(4 / 6)
    assert found.kept_by_active_blocks == pytest.approx(2 / 6)


def test_files_hold_one_batch_or_several_by_name(tmp_path):
    hidden, weight, targets = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    torch.save({"hidden": hidden, "weight": weight, "targets": targets}, tmp_path / "one.pt")
    (one,) = file_batches(tmp_path / "one.pt", torch.bfloat16, CPU)
    assert (one.data, one.name, one.shape, one.hidden.dtype) == ("file", "one", Shape(6, 4, 9), torch.bfloat16)
    torch.save({name: (hidden, weight, targets) for name in ("train", "val")}, tmp_path / "two.pt")
    train, val = file_batches(tmp_path / "two.pt", torch.float32, CPU)
    assert (train.name, val.name) == ("train", "val")
    assert torch.equal(val.weight, weight)
    for wrong in (
        {"a": (hidden, weight)},
        {"a": (hidden[None], weight, targets[None])},
        {"a": 1},
        {"a": (hidden, weight[:, :3], targets)},
        {"a": (hidden, weight, targets + 9)},
        {"a": (hidden, weight, targets - 9)},
        {"a": (hidden, weight, torch.full_like(targets, -100))},
        {"a": (hidden, weight, targets.float())},
        {"hidden": hidden, "weight": weight, "labels": targets},
        [hidden],
        {},
        torch.nn.Linear(2, 2),
    ):
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(CommandError, match="wrong.pt"):
            file_batches(tmp_path / "wrong.pt", torch.float32, CPU)
    torch.save({"a": (hidden, weight, targets.int())}, tmp_path / "int32.pt")
    (batch,) = file_batches(tmp_path / "int32.pt", torch.float32, CPU)
    assert torch.equal(batch.targets, targets)


def test_a_file_of_something_else_says_what_it_may_hold(tmp_path):
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name in ("text", "module"):
        with pytest.raises(CommandError) as error:
            file_batches(tmp_path / f"{name}.pt", torch.float32, CPU)
        said = str(error.value)
        assert 'must hold {"hidden", "weight", "targets"} or {name: (hidden, weight, targets)}' in said
        assert "weights_only=True" in said
        assert "\x1b" not in said
        assert "\n" not in said
    torch.save({name: torch.zeros(2, 2) for name in ("hidden", "weight", "labels")}, tmp_path / "labels.pt")
    with pytest.raises(CommandError, match="it holds 'hidden', 'weight', 'labels'"):
        file_batches(tmp_path / "labels.pt", torch.float32, CPU)


# ---- the probe


def test_ids_spread_over_the_vocabulary_in_order():
    places = spread(1000, 20_000)
    assert len(places.unique()) == 1000
    assert torch.equal(places, places.sort().values)
    assert places[-1] < 20_000
    assert (places < 2_000).sum() > 3 * (places >= 18_000).sum() > 0


def test_text_is_read_once_and_up_to_the_limit(tmp_path):
    for name in ("a.py", "b.md", "copy_of_b.md"):
        (tmp_path / name).write_text(("a" if name == "a.py" else "b") + "x = 1\n" * 400)
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "data.bin").write_bytes(b"\0" * 5000)
    (tmp_path / "latin.txt").write_bytes(b"\xe9 " * 2000)
    texts = text.read_texts(10**6, [tmp_path])
    assert sorted(found[0] for found in texts) == ["a", "b"]
    assert len(text.read_texts(1, [tmp_path])) == 1
    with pytest.raises(CommandError, match="none"):
        text.read_texts(1, [tmp_path / "nothing"])


def test_texts_become_ids_that_repeat_as_they_do():
    words = " ".join(f"word{number}" for number in range(300))
    tokens = text.tokenize([words, "other", words], 2000)
    assert 0 <= tokens.min() < tokens.max() < 2000
    ends = (tokens == tokens[-1]).nonzero()
    assert len(ends) == 3  # a mark after each
    first = ends[0].item() + 1
    assert torch.equal(tokens[:first], tokens[-first:])
    with pytest.raises(CommandError, match="vocabulary"):
        text.tokenize([words], 200)


def test_the_probe_learns_the_text_and_keeps_what_its_loss_saw():
    tokens = torch.arange(4000) % 37 * 11
    training = probe.Training(layers=1, sequence=32, batch=8, steps=60, held_out=4, learning_rate=3e-3)
    seen = []
    train, val = probe.probe_batches(
        tokens, Shape(100, 64, 2000), torch.float32, CPU, training, lambda *at: seen.append(at)
    )
    assert (train.data, train.name, val.name) == ("file", "probe train", "probe val")
    assert train.shape == val.shape == Shape(100, 64, 2000)
    assert [step for step, _ in seen] == [0, 20, 40, 59]
    assert seen[0][1] == pytest.approx(7.6, abs=0.3)  # ln 2000
    assert softmax_statistics(train).loss < seen[0][1] - 1
    # A sequence is 32 tokens and the one after them, which is a target only.
    assert torch.equal(train.targets[:64], torch.cat([tokens[1:33], tokens[34:66]]))
    with pytest.raises(CommandError, match="sequences"):
        probe.probe_batches(tokens[:100], TINY, torch.float32, CPU, training, print)


def test_the_probe_trains_on_the_right_gradients(monkeypatch):
    monkeypatch.setattr(probe, "_CHUNK", 7)
    batch = random_batch(Shape(20, 8, 30), torch.float32, CPU)
    value, grads = correctness.gradients(probe._ChunkedLoss.apply, batch, frozen_weight=False)
    assert max(correctness.errors(value, grads, yardstick.measure(batch)).parts.values()) < 1e-5


# ---- the check


def test_the_reference_is_pytorchs_in_float64(monkeypatch):
    monkeypatch.setattr(yardstick, "_LOGITS", 32 * TINY.vocab)  # several chunks
    monkeypatch.setattr(yardstick, "_BLOCK", 16)
    batch = random_batch(TINY, torch.float32, CPU)
    batch.targets[3:60] = -100
    hidden, weight = (x.double().requires_grad_() for x in (batch.hidden, batch.weight))
    loss = F.cross_entropy(hidden @ weight.T, batch.targets)
    loss.backward()
    right = yardstick.measure(batch)
    assert right.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(right.d_hidden, hidden.grad)
    torch.testing.assert_close(right.d_weight, weight.grad)
    # What PyTorch itself is off by, all at once.
    value, grads = correctness.gradients(CANDIDATES["eager_full"].build(), batch, False)
    own = correctness.errors(value, grads, right)
    assert right.own.hidden == pytest.approx(own.hidden, rel=0.2)
    assert 0 < right.own.weight < own.weight, "chunks are summed wide"


def test_the_strictest_filter_is_what_it_says(monkeypatch):
    """Its errors, from whole matrices: chunks and one pass give the same. The mean is put back into hidden's."""
    batch = trained_batch(Shape(300, 64, 900), torch.float32, CPU)
    batch.targets[5:40] = -100
    valid = batch.targets != -100
    hidden, weight = batch.hidden.double(), batch.weight.double()
    softmax = (hidden[valid] @ weight.T).softmax(-1)
    gone = yardstick.left_out_by_filter(softmax, batch.targets[valid][:, None], 2.0**-6) / valid.sum()
    assert 0 < gone.sum() < 0.25
    part, mass = gone @ weight, gone.sum(1, keepdim=True)
    monkeypatch.setattr(yardstick, "_LOGITS", 128 * 900)  # three chunks, one of its blocks each
    right = yardstick.measure(batch, 2.0**-6)
    left = part - mass * part.sum(0) / mass.sum()
    assert right.filtered.hidden == pytest.approx((left.norm() / right.d_hidden.norm()).item(), rel=1e-9)
    assert right.filtered.weight == pytest.approx(
        ((gone.T @ hidden[valid]).norm() / right.d_weight.norm()).item(), rel=1e-9
    )


class _Scaled(torch.autograd.Function):
    """Itself forwards, ``factor`` times the gradient backwards."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def _planted(name: str, wrong: str, factor: float, filtering: Filtering = UNFILTERED) -> Candidate:
    """Full logits, but with the loss or the gradient of one input scaled."""

    def loss(hidden, weight, targets):
        hidden = _Scaled.apply(hidden, factor if wrong == "hidden" else 1.0)
        weight = _Scaled.apply(weight, factor if wrong == "weight" else 1.0)
        value = F.cross_entropy((hidden @ weight.T).float(), targets)
        return _Scaled.apply(value * factor, 1 / factor) if wrong == "loss" else value

    return Candidate(name, lambda **_: loss, ours=filtering != UNFILTERED, any_size=True, filtering=filtering)


def _no_timer(run, parts):
    raise AssertionError("what is wrong must not be timed")


@pytest.mark.parametrize("wrong", ["hidden", "weight"])
@pytest.mark.parametrize("factor", [1.001, 0.0, float("nan")])
def test_a_wrong_gradient_is_not_timed(wrong, factor):
    batch = random_batch(TINY, torch.float32, CPU)
    candidate = _planted("planted", wrong, factor)
    (case,) = measure.measure([candidate], batch, yardstick.measure(batch), False, _no_timer)
    assert case.status.startswith("wrong: ")
    assert case.forward_backward_ms is case.forward_ms is None
    (check,) = measure.check(candidate, torch.float32, CPU)
    assert check.status.startswith("wrong: ")


@pytest.mark.parametrize("kind", ["random", "trained"])
@pytest.mark.parametrize(("wrong", "factor"), [("loss", 1.01), ("loss", 0.99), ("hidden", 1.03), ("weight", 0.97)])
def test_in_bfloat16_a_few_percent_are_too_much(kind, wrong, factor):
    make = {"random": random_batch, "trained": trained_batch}[kind]
    batch = make(Shape(200, 256, 1000), torch.bfloat16, CPU)
    right = yardstick.measure(batch)
    (case,) = measure.measure([_planted("planted", wrong, factor)], batch, right, False, _no_timer)
    assert case.status.startswith("wrong: ")
    assert right.allowed(of_mean=True).loss < 3e-3
    for name in ("chunked", "reference"):
        found = correctness.errors(*correctness.gradients(CANDIDATES[name].build(), batch, False), right)
        assert found.within(right.allowed(of_mean=True)), name


@pytest.mark.parametrize("wrong", ["hidden", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_filters_may_not_lose_a_tenth(wrong, dtype):
    """On random data nothing that counts is below the threshold; on trained-like data less than that is."""
    candidate = _planted("planted", wrong, 0.9, Filtering(True, True))
    for data, settings in correctness.checks(candidate):
        batch = correctness.small_batch(candidate, data, dtype, CPU)
        right = correctness.yardstick(batch, [candidate], settings)
        found = correctness.errors(*correctness.gradients(candidate.build(), batch, False), right)
        most = correctness.allowed(candidate, right)
        assert getattr(found, wrong) == pytest.approx(0.1, rel=0.1)
        assert "wrong: " in correctness.complaint(found, most), data
        assert getattr(most, wrong) < (0.075 if data == correctness.TRAINED else 2e-3 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [correctness.PEAKED, correctness.PEAKED_INTERPRETED], ids=str)
def test_the_trained_like_check_has_tiles_to_drop(shape):
    batch = trained_batch(shape, torch.float32, CPU)
    softmax = (batch.hidden @ batch.weight.T).softmax(-1)
    active = torch.stack([(block >= correctness.PEAKED_EPS).any(0) for block in softmax.split(128)])
    active = active[:, active.sum(0).argsort(descending=True)]
    tiles = F.pad(active, (0, -shape.vocab % 128)).view(len(active), -1, 128).any(-1)
    assert tiles.float().mean() < 0.4  # past 0.6 the kernels compute all of them
    small = softmax.masked_fill(softmax >= correctness.PEAKED_EPS, 0).sum(1)
    assert max(block.mean() for block in small.split(32)) < 0.2  # past 0.25 a block is kept whole


def test_a_filter_that_drops_nothing_is_wrong(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(correctness, "checks", lambda _: [(correctness.TRAINED, {"filter_eps": None})])
    monkeypatch.setattr(correctness, "PEAKED_INTERPRETED", Shape(32, 32, 100))
    monkeypatch.setattr(correctness, "PEAKED", Shape(32, 32, 100))
    (check,) = measure.check(CANDIDATES["cce"], torch.float32, torch.device("cuda" if _CARD else "cpu"))
    assert check.status.startswith("wrong: every tile is kept")


def test_a_wrong_loss_is_refused():
    candidate = Candidate("planted", lambda: lambda h, w, t: F.cross_entropy(h @ w.T, t) + 1)
    batch = random_batch(TINY, torch.float32, CPU)
    (case,) = measure.measure([candidate], batch, yardstick.measure(batch), True, _no_timer)
    assert case.status.startswith("wrong: loss")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "out of memory"),
        (ValueError("V must be a multiple of 8\nmore"), "failed: ValueError: V must be a multiple of 8"),
    ],
)
def test_what_a_loss_raises_is_its_result(error, status):
    def fail(hidden, weight, targets):
        raise error

    batch = random_batch(TINY, torch.float32, CPU)
    (case,) = measure.measure([Candidate("broken", lambda: fail)], batch, yardstick.measure(batch), False, _no_timer)
    assert case.status == status


def test_losses_take_turns_and_one_that_fails_has_no_more():
    """Three quantities, each with all the losses in balanced order; the second loss breaks in the third turn."""
    order, calls = [], dict.fromkeys("abc", 0)

    def noting(name):
        def loss(hidden, weight, targets):
            order.append(name)
            calls[name] += 1
            if name == "b" and calls[name] == 4:  # the check is the first
                raise RuntimeError("a fault of the third turn")
            return F.cross_entropy(hidden @ weight.T, targets)

        return Candidate(name, lambda: loss, any_size=True)

    batch, steps = random_batch(TINY, torch.float32, CPU), []

    def timer(run, parts):
        assert parts == timing.TURNS
        run()
        return timing.Timing((float(len(order)),))

    refused = Candidate("refused", lambda: None)
    cases = measure.measure(
        [*map(noting, "abc"), refused], batch, yardstick.measure(batch), True, timer, {"refused": "wrong"}, steps.append
    )
    assert "".join(order) == "abc" + "abc" + "cba" + "abc" + "ca" + 2 * "accaacca"
    assert [case.status for case in cases] == ["ok", "failed: RuntimeError: a fault of the third turn", "ok", "wrong"]
    # Its calls were the 4th, 9th, 10th and 14th.
    assert (cases[0].forward_backward_ms, cases[1].forward_backward_ms) == (9.5, None)
    assert cases[1].grad_error_hidden < 1e-5
    assert [steps.count(case.impl) for case in cases] == 4 * [measure.STEPS]


def test_filtering_and_other_packages_may_be_less_exact():
    batch = trained_batch(Shape(256, 256, 20_000), torch.bfloat16, CPU)
    names = ("cce", "cce_exact", "cce_kahan_full_c", "eager_full", "apple_cce", "liger")
    candidates = {name: CANDIDATES[name] for name in names}
    right = correctness.yardstick(batch, list(candidates.values()))
    most = {name: correctness.allowed(candidate, right) for name, candidate in candidates.items()}
    assert most["cce_exact"] == most["eager_full"]
    assert most["cce_exact"].hidden < most["cce"].hidden < 3e-2
    assert most["cce_exact"].weight < most["cce"].weight < 3e-2
    assert most["cce_kahan_full_c"].hidden == most["cce"].hidden
    assert most["cce_kahan_full_c"].weight == most["cce_exact"].weight
    assert most["cce"].loss == most["cce_exact"].loss < 3e-3 < most["liger"].loss < 1.2e-2
    assert most["cce"].weight < most["liger"].weight < most["apple_cce"].weight < 0.15


# ---- a whole run, on the CPU's clock


@pytest.fixture
def plan(tmp_path):
    """A run by the CPU's clock: everything else is what runs on a card."""

    def timer(run, parts=1):
        start = time.perf_counter()
        run()
        return timing.Timing(((time.perf_counter() - start) * 1e3,))

    def make(candidates: list[Candidate], sources: list[session.Source], device=CPU) -> session.Plan:
        where = tmp_path / "results"
        return session.Plan(candidates, sources, device, torch.float32, timer, where, "tune-lce bench --x")

    return make


@pytest.fixture
def _small_checks(monkeypatch):
    """The interpreter takes half a minute for the kernels at the sizes that a card checks."""
    monkeypatch.setattr(correctness, "RAGGED", Shape(70, 40, 333))
    monkeypatch.setattr(correctness, "ALIGNED", Shape(64, 64, 256))
    monkeypatch.setattr(correctness, "PEAKED_INTERPRETED", Shape(32, 64, 500))


@pytest.mark.usefixtures("_small_checks")
def test_results_are_written_as_documented(plan, tmp_path, capsys, device):
    shape = Shape(40, 32, 100)
    torch.save({"saved": (torch.randn(40, 16), torch.randn(90, 16), torch.randint(90, (40,)))}, tmp_path / "x.pt")
    # Compilers take their time: what the ratios are to is full logits here without one.
    baseline = Candidate(BASELINE, CANDIDATES["eager_full"].build)
    candidates = [CANDIDATES["cce"], CANDIDATES["chunked"], baseline]
    names = [candidate.name for candidate in candidates]
    sources = [session.Source("random", shape), session.Source("file", path=tmp_path / "x.pt")]
    assert session.bench(plan(candidates, sources, device))

    results = json.loads((tmp_path / "results" / session.RESULTS).read_text())
    assert {"device", "driver", "torch", "triton", "commit", "command", "cases"} <= results.keys()
    assert (results["torch"], results["command"]) == (torch.__version__, "tune-lce bench --x")
    wanted = {
        (name, data, frozen)
        for name in names
        for data in (("random", "random"), ("file", "saved"))
        for frozen in (False, True)
    }
    cases, floors = results["cases"], {floor["data_name"]: floor for floor in results["floors"]}
    assert {(c["impl"], (c["data"], c["data_name"]), c["frozen_weight"]) for c in cases} == wanted
    assert len(cases) == len(wanted)
    for case in cases:
        assert case["status"] == "ok"
        assert case["shape"] == vars(shape if case["data"] == "random" else Shape(40, 16, 90))
        assert case["forward_ms"] > 0
        assert case["forward_recording_ms"] > 0
        assert case["forward_backward_ms"] > 0
        assert case["spread_ms"] >= 0
        assert case["ratio_to_torch_compile_full"] > 0
        for name in ("peak_mib", "host_ms", "launches", "queued_ms", "queued_ratio_to_torch_compile_full"):
            assert (case[name] is None) == (device.type == "cpu")  # a card's to tell
        rate = floors[case["data_name"]]["tflops"]
        assert case["cublas_fraction"] == pytest.approx(case["forward_backward_tflops"] / rate)
        forward = Shape(**case["shape"]).flops(None) / case["forward_ms"] / 1e9
        assert case["forward_cublas_fraction"] == pytest.approx(forward / rate)
        assert 0 < case["grad_error_hidden"] < 1e-4
        assert (case["grad_error_weight"] is None) == case["frozen_weight"]
        assert (case["kept_fraction"] is None) == (case["impl"] != "cce")
        assert case["kept_fraction"] is None or 0 < case["kept_fraction"] <= 1
        if case["impl"] == "torch_compile_full":
            assert case["ratio_to_torch_compile_full"] == 1
    assert [case["frozen_weight"] for case in cases] == len(cases) // 2 * [False, True]
    assert {name: floor["logits_gemm_ms"] > 0 for name, floor in floors.items()} == {"random": True, "saved": True}
    assert results["data"][0]["entropy"] > 0
    assert (tmp_path / "results" / session.PICTURE).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "torch_compile_full" in printed
    assert "2NDV" in printed


def test_the_table_has_a_column_for_each_measurement():
    shape = Shape(1000, 1000, 500_000)  # 2NDV is 1e12
    fast = measure.Case("fast", shape, "random", "random", False, "ok", host_ms=1.234, launches=1040)
    fast.forward_ms, fast.forward_backward_ms, fast.forward_backward_tflops = 4.0, 10.0, 300.0
    slow = measure.Case("slow", shape, "random", "random", True, "failed: RuntimeError: x")
    base = measure.Case(BASELINE, shape, "random", "random", False, "ok", forward_ms=8.0, forward_backward_ms=20.0)
    base.forward_backward_tflops = 150.0
    fast.queued_ms, base.queued_ms = 4.5, 18.0
    measure.compare([fast, slow, base], projection_tflops=500.0)
    assert (fast.cublas_fraction, fast.forward_cublas_fraction) == (0.6, 0.5)
    assert (base.cublas_fraction, slow.cublas_fraction) == (0.3, None)
    assert (fast.ratio_to_torch_compile_full, base.ratio_to_torch_compile_full) == (0.5, 1)
    columns = {column.header: list(column.cells) for column in report.table([fast, slow, base]).columns}
    cells = {
        "host\nms": "1.23",
        "launches": "1,040",
        "of cuBLAS's\nown rate": "0.60",
        "x compiled\nfull logits": "0.50",
        "queued\nms": "4.50",
        "x compiled,\nqueued": "0.25",
    }
    assert {name: columns[name][0] for name in cells} == cells
    assert {columns[name][1] for name in cells} == {""}
    assert columns[""] == ["", "failed: RuntimeError: x", ""]


def test_a_run_goes_on_past_what_is_wrong_absent_or_broken(plan, tmp_path, capsys):
    def fail(hidden, weight, targets):
        raise RuntimeError("no kernel for this size")

    candidates = [
        _planted("planted", "weight", float("nan")),
        Candidate("absent", lambda: fail, requires="no_such_module"),
        Candidate("odd", lambda: int("no number"), requires="json"),
        # Its package is there, and what that needs is not.
        Candidate("lame", lambda: __import__("no_such_dependency"), requires="json"),
        Candidate("broken", lambda: fail),
        CANDIDATES["reference"],
    ]
    assert session.bench(plan(candidates, [session.Source("trained", TINY)]))
    written = json.loads((tmp_path / "results" / session.RESULTS).read_text())
    lame = "json cannot be imported: No module named 'no_such_dependency'"
    odd = "json cannot be imported: invalid literal for int() with base 10: 'no number'"
    assert written["left_out"] == {"absent": "no_such_module is not installed", "odd": odd, "lame": lame}
    cases = written["cases"]
    assert {case["impl"] for case in cases} == {"planted", "broken", "reference"}
    status = {(case["impl"], case["frozen_weight"]): case["status"] for case in cases}
    assert status["planted", False].startswith("small random data: wrong: ")
    assert status["planted", True].startswith("small random data: wrong: ")
    assert status["broken", False] == "failed: RuntimeError: no kernel for this size"
    assert status["reference", True] == "ok"
    assert not any(case["forward_ms"] for case in cases if case["impl"] != "reference")
    printed = capsys.readouterr().out
    assert "absent is left out: no_such_module is not installed" in printed
    assert f"lame is left out: {lame}" in printed
    assert "planted fails" in printed


@pytest.mark.parametrize("step", ["measure.time_projection", "correctness.yardstick", "make"])
def test_a_batch_that_does_not_fit_is_a_result_and_the_next_one_runs(plan, tmp_path, monkeypatch, capsys, step):
    step = "trained_batch" if step == "make" else step
    full = Shape(50, 16, 90)
    module, _, name = step.rpartition(".")
    place = getattr(session, module) if module else session
    real = getattr(place, name)

    def fail_once(first, *others):
        if first == full or getattr(first, "shape", None) == full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 62.50 GiB")
        return real(first, *others)

    monkeypatch.setattr(place, name, fail_once)
    made = plan([CANDIDATES["chunked"]], [session.Source("trained", full), session.Source("random", TINY)])
    assert session.bench(made)
    results = json.loads((tmp_path / "results" / session.RESULTS).read_text())
    (first, second) = results["data"]
    assert first["status"].startswith("out of memory")
    assert (first["data"], first["shape"], second["status"]) == ("trained", vars(full), "ok")
    assert {(case["data"], case["status"]) for case in results["cases"]} == {("random", "ok")}
    assert "out of memory" in capsys.readouterr().out
    with pytest.raises(CommandError, match="none of the data fit"):
        session.bench(plan([CANDIDATES["chunked"]], [session.Source("trained", full)]))


def test_an_error_that_is_not_of_memory_is_not_hidden(plan, monkeypatch):
    def fail(batch, timer):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(session.measure, "time_projection", fail)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        session.bench(plan([CANDIDATES["chunked"]], [session.Source("random", TINY)]))


def test_the_projection_is_timed_in_slices_that_cover_every_token(monkeypatch):
    batch = random_batch(TINY, torch.float32, CPU)
    real, rows = torch.mm, []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: rows.append(len(a)) or real(a, b, out=out))
    monkeypatch.setattr(measure, "_PROJECTION_LOGITS", 50 * TINY.vocab)
    assert measure.time_projection(batch, lambda run: timing.clock_timer(run, calls=2)) > 0
    assert rows == 3 * [50, 50, 30]


def test_a_wrong_loss_of_our_own_fails_the_run(plan):
    candidates = [Candidate("ours", _planted("", "hidden", 2.0).build), CANDIDATES["eager_full"]]
    sources = [session.Source("random", TINY)]
    assert session.bench(plan(candidates, sources))
    ours = Candidate("chunked", candidates[0].build, ours=True)
    assert not session.bench(plan([ours], sources))


# ---- the command


@pytest.mark.usefixtures("_small_checks")
def test_check_only_runs_anywhere(tune_lce):
    names = ("cce", "chunked", "reference", "eager_full", "torchtune_main")
    status, printed = tune_lce("--check-only", "--only", ", ".join((*names, "liger")), "--dtype", "float32")
    assert status == 0
    rows = [(*line.split()[:2], line.split()[-1]) for line in printed.splitlines() if " / " in line]
    assert ("cce", "trained-like", "ok") in rows, printed
    for name in names:
        assert (name, "random", "ok") in rows, printed


def test_torchtunes_release_is_right(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    (check,) = measure.check(CANDIDATES["torchtune"], torch.float32, CPU)
    assert check.status == measure.OK
    assert check.found.hidden < 1e-6


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch 2.13")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_loss_is_right_and_holds_no_logits(dtype):
    """Without its options it would: more of them than of anything else here."""
    candidate = CANDIDATES["torch_linear_ce"]
    assert candidate.obstacle(CPU, dtype) is None
    (check,) = measure.check(candidate, dtype, CPU)
    assert check.status == measure.OK
    batch = random_batch(Shape(512, 16, 2048), dtype, CPU)
    loss = candidate.build()
    found = usage(lambda: correctness.gradients(loss, batch, frozen_weight=False), CPU, interpreted=False)
    assert found.peak < batch.shape.tokens * batch.shape.vocab * dtype.itemsize / 2


def test_a_torch_without_its_own_loss_says_so():
    candidate = Candidate("torch_next", lambda: None, requires="torch.nn.modules.not_yet")
    assert candidate.obstacle(CPU, torch.float32) == "the installed torch has no torch.nn.modules.not_yet"


def test_check_only_fails_on_a_wrong_loss(tune_lce, monkeypatch):
    monkeypatch.setattr(
        "torchtune_lce.commands.shared.candidates._ALL", (_planted("eager_full", "hidden", 1.01), CANDIDATES["chunked"])
    )
    status, printed = tune_lce("--check-only", "--dtype", "float32")
    assert status == 1
    assert "wrong: " in printed


def test_without_a_card_nothing_is_timed(tune_lce, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, printed = tune_lce("--output", tmp_path / "results")
    assert status == 2
    assert "there is no CUDA card to time on; --cpu times on the processor" in printed
    assert not (tmp_path / "results").exists()


def test_times_on_the_processor(tune_lce, monkeypatch, tmp_path):
    """By the clock, though there be a card; beside PyTorch's own full logits, which need no compiler."""
    monkeypatch.setattr(timing, "_CLOCKED_CALLS", 1)
    status, _ = tune_lce(
        *("--cpu", "--data", "random:64x16x300", "--only", "eager_full,chunked", "--output", tmp_path / "results")
    )
    assert status == 0
    results = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert (results["device"].split()[0], results["dtype"]) == ("CPU", "float32")
    assert {(case["impl"], case["frozen_weight"]) for case in results["cases"]} == {
        (impl, frozen) for impl in ("eager_full", "chunked") for frozen in (True, False)
    }
    assert all(case["status"] == "ok" and case["forward_backward_ms"] > 0 for case in results["cases"])


def test_data_that_are_no_numbers_are_recorded_beside_others(tune_lce, monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_CLOCKED_CALLS", 1)
    hidden, weight, targets = torch.randn(64, 16), torch.randn(300, 16), torch.randint(0, 300, (64,))
    broken = hidden.clone()
    broken[3, 2] = torch.nan
    torch.save({"good": (hidden, weight, targets), "bad": (broken, weight, targets)}, tmp_path / "data.pt")
    status, printed = tune_lce(
        *("--cpu", "--data", "file", "--file", tmp_path / "data.pt", "--only", "eager_full,chunked"),
        *("--output", tmp_path / "results"),
    )
    assert status == 1
    cases = json.loads((tmp_path / "results" / "bench.json").read_text())["cases"]
    assert {case["data_name"]: case["status"].split(":")[0] for case in cases if case["impl"] == "chunked"} == {
        "good": "ok",
        "bad": "wrong",
    }


def test_a_folder_that_is_not_its_own_is_left_alone(tune_lce, tmp_path):
    (tmp_path / "thesis.md").write_text("mine")
    for output, said in ((tmp_path, "--output must be a new folder"), (tmp_path / "thesis.md" / "x", "can be written")):
        status, printed = tune_lce("--cpu", "--data", "random:64x16x300", "--only", "chunked", "--output", output)
        assert status == 2
        assert said in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--check-only", "--data", "random"], "--data is not for --check-only"),
        (["--check-only", "--file", "x.pt"], "--file is not for --check-only"),
        (["--check-only", "--model", "gemma2_2b"], "--model is not for --check-only"),
        (["--check-only", "--tokens", "4096"], "--tokens is not for --check-only"),
        (["--check-only", "--vocab", "400"], "--vocab is not for --check-only"),
        (["--check-only", "--output", "x"], "--output is not for --check-only"),
        (["--filter-eps", "2^"], "--filter-eps takes numbers as 1.2e-4 or 2^-13 with commas between them, got '2^'"),
        (["--filter-eps", "1e-3,-2^-0.5"], "got '1e-3,-2^-0.5'"),
        (["--filter-eps", "0^-1"], "got '0^-1'"),
        (["--filter-eps", "0.1,2^3"], "--filter-eps takes numbers in [0, 1), got '2^3'"),
        (["--filter-eps", "nan"], "--filter-eps takes numbers in [0, 1), got 'nan'"),
        (
            ["--filter-eps", "0.1", "--only", "cce_exact,liger"],
            "--filter-eps is for losses of this package that filter",
        ),
        (["--filter-eps", "0.1", "--divergence", "forward"], "--filter-eps is not for --divergence"),
        (["--workspace-mib", "0"], "--workspace-mib must be at least 1, got 0"),
        (["--only", "cce,fastest"], "'fastest'"),
        (["--model", "llama9"], "'llama9'"),
        (["--data", "imagined"], "'imagined'"),
        (["--data", "random:10x20"], "'10x20'"),
        (["--data", "file"], "--file PATH"),
        (["--data", "file", "--file", "nowhere.pt"], "nowhere.pt is no file"),
        (["--file", "nowhere.pt"], "--data file"),
        (["--tokens", "0"], "tokens must be at least 1"),
        (["--tokens", "1024,0"], "tokens must be at least 1"),
        (["--tokens", "1024;2048"], "--tokens takes whole numbers with commas between them, got '1024;2048'"),
        (["--tokens", "0", "--data", "random:gemma2_2b"], "tokens must be at least 1"),
    ],
)
def test_arguments_that_make_no_sense(tune_lce, arguments, said):
    status, printed = tune_lce(*arguments)
    assert status == 2
    assert said in printed


def _sources(*arguments: str) -> list[session.Source]:
    from torchtune_lce.commands.bench import command

    return command.read_sources(tune_parser.TuneLCEParser()._parser.parse_args(["bench", *arguments]))


def test_data_and_shapes_of_the_command_line(tmp_path):
    (tmp_path / "x.pt").touch()
    arguments = ["--file", str(tmp_path / "x.pt"), "--model", "gemma2_2b", "--tokens", "4096", "--hidden", "1024"]
    for data in ("trained", "random:8192x4096x128256", "probe:llama3_2_1b", "file"):
        arguments += ["--data", data]
    assert _sources(*arguments) == [
        session.Source("trained", Shape(4096, 1024, 256_000)),
        session.Source("random", Shape(8192, 4096, 128_256)),
        session.Source("probe", Shape(4096, 2048, 128_256)),
        session.Source("file", path=tmp_path / "x.pt"),
    ]


def test_few_and_many_tokens_are_measured_where_none_are_named():
    """A model's name in place of a shape names no tokens; a probe is trained once, for the most of them."""
    assert _sources() == [session.Source("trained", Shape(n, 2048, 151_936)) for n in (1024, 2048, 8192)]
    data = ["--data", "random:gemma2_2b", "--data", "probe", "--data", "random:100x20x30"]
    assert _sources(*data) == [
        *(session.Source("random", Shape(n, 2304, 256_000)) for n in (1024, 2048, 8192)),
        session.Source("probe", Shape(8192, 2048, 151_936), fewer=(1024, 2048)),
        session.Source("random", Shape(100, 20, 30)),
    ]
    assert _sources("--tokens", "64, 16,64") == [session.Source("trained", Shape(n, 2048, 151_936)) for n in (64, 16)]


def test_a_probe_of_several_sizes_is_trained_once(plan, tmp_path, monkeypatch):
    trained = []

    def batches(console, shape, plan):
        trained.append(shape)
        return [dataclasses.replace(random_batch(shape, plan.dtype, plan.device), name=name) for name in ("a", "b")]

    monkeypatch.setattr(session, "_probe_batches", batches)
    source = session.Source("probe", TINY, fewer=(20,))
    assert session.bench(plan([CANDIDATES["eager_full"]], [source]))
    assert trained == [TINY]
    data = json.loads((tmp_path / "results" / session.RESULTS).read_text())["data"]
    assert [(x["data_name"], x["shape"]["tokens"]) for x in data] == [(n, t) for n in "ab" for t in (20, 130)]


def test_presets_only_on_request():
    names = [candidate.name for candidate in select(None)]
    assert {"cce", "cce_exact", "torch_compile", "chunked", "reference"} <= set(names)
    assert {"eager_full", "torch_compile_full", "torchtune", "torchtune_main"} <= set(names)
    assert {"torch_linear_ce", "apple_cce", "liger", "quack"} <= set(names)
    assert "cce_kahan_full_c" not in names
    asked = select(["quack", "cce_kahan_full_c"])
    assert [candidate.name for candidate in asked] == ["cce_kahan_full_c", "quack"]


def test_the_workspace_is_our_losses_own(monkeypatch):
    seen = []
    real = choice._FUNCTIONS["chunked"]
    monkeypatch.setitem(
        choice._FUNCTIONS, "chunked", lambda call: seen.append(call.options.workspace_mib) or real(call)
    )
    batch = random_batch(TINY, torch.float32, CPU)
    right = yardstick.measure(batch)
    candidates = [*select(["chunked", "eager_full"], workspace_mib=7), *select(["chunked"])]
    cases = measure.measure(candidates, batch, right, False, timing.clock_timer)
    assert [(case.impl, case.status, case.workspace_mib) for case in cases] == [
        ("chunked", "ok", 7),
        ("eager_full", "ok", None),
        ("chunked", "ok", 128),
    ]
    assert set(seen) == {7, 128}


def test_losses_that_filter_are_measured_with_each_threshold(device):
    if device.type == "cpu":
        pytest.importorskip("triton")
    thresholds = command._thresholds("2^-6,0.001953125,2^-9,0.0156250001")
    assert thresholds == [2.0**-6, 2.0**-9]
    candidates = select(["cce", "cce_exact", "eager_full"], filter_eps=thresholds)
    batch = trained_batch(correctness.PEAKED_INTERPRETED, torch.float32, device)
    right = correctness.yardstick(batch, candidates)
    cases = measure.measure(candidates, batch, right, False, timing.clock_timer)
    named = [(case.impl, case.status, case.filter_eps) for case in cases]
    assert named == [
        ("cce@0.015625", "ok", 2.0**-6),
        ("cce@0.00195312", "ok", 2.0**-9),
        ("cce_exact", "ok", None),
        ("eager_full", "ok", None),
    ]
    loose, strict = cases[:2]
    assert loose.kept_fraction < strict.kept_fraction
    assert loose.grad_error_hidden > strict.grad_error_hidden
    assert [candidate.obstacle(device, torch.float32) for candidate in candidates] == [None] * 4
    for candidate in candidates[:2]:
        assert [check.status for check in measure.check(candidate, torch.float32, device)] == ["ok", "ok"]
    (default,) = select(["cce"])
    thresholds = [measure.new_case(default, batch, frozen, "ok").filter_eps for frozen in (False, True)]
    assert thresholds == [torch.finfo(torch.float32).eps / part for part in (AUTO_TRAINED, AUTO_FROZEN)]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_checkout(tmp_path):
    root = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode:
        assert environment.commit() is None
    else:
        assert environment.commit().removesuffix("+changes") == head.stdout.strip()


def test_times_are_summed_up_by_their_quarters():
    one, four = timing.Timing((7.0,)), timing.Timing((4.0, 1.0, 3.0, 2.0))
    assert (one.median, one.spread) == (7.0, 0.0)
    assert (four.median, four.spread) == (2.5, 1.5)


def test_turns_go_forwards_and_backwards_as_often():
    assert list(timing.in_turns("ABC", 2)) == list("ABCCBA")
    assert timing.TURNS % 2 == 0


def test_a_part_of_the_time_takes_a_part_of_the_calls():
    count = []
    for parts, timed in ((1, 6), (3, 2), (9, 1)):
        count.clear()
        found = timing.clock_timer(lambda: count.append(1), parts, calls=6)
        assert (len(found.calls), len(count)) == (timed, timed + 1)


def test_the_host_is_timed_from_an_idle_card_until_the_call_returns():
    happened = []

    def run():
        happened.append("run")
        time.sleep(0.002)

    def wait():
        happened.append("wait")
        time.sleep(0.02)

    found = timing.host_ms(run, wait)
    assert 2 <= found < 15
    calls = happened.count("run")
    assert calls >= 5
    assert happened == ["wait", "run"] * calls + ["wait"]


def test_launches_are_the_cards_own_work():
    names = {
        "kernel": "_exponential_kernel",
        "gpu_memcpy": "Memcpy DtoD (Device -> Device)",
        "gpu_memset": "Memset (Device)",
        "gpu_user_annotation": "CompiledFunctionBackward",
        "cuda_runtime": "cudaLaunchKernel",
        "cpu_op": "aten::mm",
    }
    events = [{"ph": "X", "cat": category, "name": name, "ts": 1.0, "dur": 1.0} for category, name in names.items()]
    events += [events[0], {"ph": "M", "name": "process_name"}]
    assert timing.count_launches(events) == 4


@pytest.mark.skipif(_CARD, reason="counts that there is nothing to count")
def test_without_a_card_nothing_is_launched():
    count = []
    assert timing.launches(lambda: count.append(torch.ones(3) + 1)) is None
    assert len(count) == 2


@pytest.mark.gpu
def test_a_card_counts_kernels_copies_and_sets(device):
    x = torch.randn(1000, device=device)

    def run():
        with torch.profiler.record_function("not a launch"):
            return x.neg().exp(), x.clone(), torch.zeros_like(x)

    assert timing.launches(run) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("elements", [2**23, 2**27], ids=["fits the L2 cache", "does not"])
def test_the_cards_timer_measures_what_tritons_does(device, elements):
    from triton.testing import do_bench

    x = torch.randn(elements, device=device, dtype=torch.bfloat16)
    ours, tritons = timing.cuda_timer(x.neg).median, do_bench(x.neg, warmup=100, rep=500, return_mode="median")
    assert ours == pytest.approx(tritons, rel=0.2)


@pytest.mark.gpu
def test_behind_other_work_the_hosts_part_is_not_seen(device):
    x = torch.ones(1000, device=device)

    def run():
        time.sleep(0.005)
        return x.neg()

    # The first event comes after the cleared cache, when the host has begun to wait.
    assert timing.cuda_timer(run).median > 2
    assert timing.queued_timer(run, host=timing.host_ms(run)).median < 1


@pytest.mark.gpu
def test_a_card_gives_times_and_peaks(device, tmp_path):
    shape = Shape(2048, 512, 32_000)
    candidates = [CANDIDATES[name] for name in ("cce", "chunked", "eager_full", "torch_compile_full")]
    plan = session.Plan(
        candidates, [session.Source("trained", shape)], device, torch.bfloat16, timing.cuda_timer, tmp_path, "x"
    )
    assert session.bench(plan)
    cases = json.loads((tmp_path / session.RESULTS).read_text())["cases"]
    peaks = {case["impl"]: case["peak_mib"] for case in cases if not case["frozen_weight"]}
    # float32 logits of eager alone are 250 MiB.
    assert peaks["eager_full"] > 250 > 150 > peaks["cce"] >= 0
    assert all(case["forward_backward_ms"] > case["forward_ms"] > 0 for case in cases)
    assert all(case["host_ms"] > 0 and case["launches"] > 0 and 0 < case["cublas_fraction"] < 3 for case in cases)
    assert all(case["queued_ms"] > 0 and case["queued_ratio_to_torch_compile_full"] > 0 for case in cases)
    compiled = next(case for case in cases if case["impl"] == "torch_compile_full")
    assert compiled["launches"] < 30
