"""``tune-lce bench``: its data, its check before timing, its results, and everything but the card's own timer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from torchtune_lce import cli
from torchtune_lce.bench import correctness, environment, losses, measure, probe, session, text, timing
from torchtune_lce.bench.data import Batch, file_batches, random_batch
from torchtune_lce.bench.errors import BenchError
from torchtune_lce.bench.losses import Candidate
from torchtune_lce.bench.shapes import MODELS, Shape, parse_shape
from torchtune_lce.bench.statistics import softmax_statistics
from torchtune_lce.bench.trained import trained_batch

CPU = torch.device("cpu")
TINY = Shape(130, 32, 140)


# ---- shapes


def test_shapes_by_name_and_in_numbers():
    assert parse_shape("llama3_1_8b", 4096) == Shape(4096, 4096, 128_256)
    assert parse_shape("8192x2048x151936", 1) == Shape(8192, 2048, 151_936)
    assert {"llama3_2_1b", "llama3_1_8b", "qwen2_5_7b", "gemma2_2b"} <= MODELS.keys()
    for wrong in ("llama9", "8192x2048", "8192x0x100"):
        with pytest.raises(BenchError):
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
        "kept_by_active_blocks": 0.10,
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
        {"a": (hidden, weight[:, :3], targets)},
        {"a": (hidden, weight, targets + 9)},
        {"a": (hidden, weight, targets - 9)},
        {"a": (hidden, weight, torch.full_like(targets, -100))},
        {"a": (hidden, weight, targets.int())},
        [hidden],
    ):
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(BenchError, match="wrong.pt"):
            file_batches(tmp_path / "wrong.pt", torch.float32, CPU)
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(BenchError, match="torch.save"):
        file_batches(tmp_path / "text.pt", torch.float32, CPU)


# ---- the probe


def test_ids_spread_over_the_vocabulary_in_order():
    places = text.spread(1000, 20_000)
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
    with pytest.raises(BenchError, match="none"):
        text.read_texts(1, [tmp_path / "nothing"])


def test_texts_become_ids_that_repeat_as_they_do():
    words = " ".join(f"word{number}" for number in range(300))
    tokens = text.tokenize([words, "other", words], 2000)
    assert 0 <= tokens.min() < tokens.max() < 2000
    ends = (tokens == tokens[-1]).nonzero()
    assert len(ends) == 3  # a mark after each
    first = ends[0].item() + 1
    assert torch.equal(tokens[:first], tokens[-first:])
    with pytest.raises(BenchError, match="vocabulary"):
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
    with pytest.raises(BenchError, match="sequences"):
        probe.probe_batches(tokens[:100], TINY, torch.float32, CPU, training, print)


def test_the_probe_trains_on_the_right_gradients(monkeypatch):
    monkeypatch.setattr(probe, "_CHUNK", 7)
    batch = random_batch(Shape(20, 8, 30), torch.float32, CPU)
    value, grads = correctness.gradients(probe._ChunkedLoss.apply, batch, frozen_weight=False)
    assert correctness.errors(value, grads, correctness.exact(batch)).worst < 1e-5


# ---- the check


def test_the_reference_is_pytorchs_in_float64(monkeypatch):
    monkeypatch.setattr(correctness, "_REFERENCE_LOGITS", 50 * TINY.vocab)  # several chunks
    batch = random_batch(TINY, torch.float32, CPU)
    batch.targets[3:60] = -100
    hidden, weight = (x.double().requires_grad_() for x in (batch.hidden, batch.weight))
    loss = F.cross_entropy(hidden @ weight.T, batch.targets)
    loss.backward()
    right = correctness.exact(batch)
    assert right.loss == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(right.d_hidden, hidden.grad)
    torch.testing.assert_close(right.d_weight, weight.grad)


class _Scaled(torch.autograd.Function):
    """Itself forwards, ``factor`` times the gradient backwards."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def _planted(name: str, wrong: str, factor: float) -> Candidate:
    """Full logits, but with the gradient of one input scaled."""

    def loss(hidden, weight, targets):
        hidden = _Scaled.apply(hidden, factor if wrong == "hidden" else 1.0)
        weight = _Scaled.apply(weight, factor if wrong == "weight" else 1.0)
        return F.cross_entropy(hidden @ weight.T, targets)

    return Candidate(name, lambda: loss, ours=False, any_size=True)


def _no_timer(run):
    raise AssertionError("what is wrong must not be timed")


@pytest.mark.parametrize("wrong", ["hidden", "weight"])
@pytest.mark.parametrize("factor", [1.001, 0.0, float("nan")])
def test_a_wrong_gradient_is_not_timed(wrong, factor):
    batch = random_batch(TINY, torch.float32, CPU)
    candidate = _planted("planted", wrong, factor)
    case = measure.measure(candidate, batch, correctness.exact(batch), False, _no_timer)
    assert case.status.startswith("wrong: ")
    assert case.forward_backward_ms is case.forward_ms is None
    status, _ = measure.check(candidate, torch.float32, CPU)
    assert status.startswith("wrong: ")


def test_in_bfloat16_a_tenth_is_too_much():
    batch = random_batch(TINY, torch.bfloat16, CPU)
    right = correctness.exact(batch)
    case = measure.measure(_planted("planted", "hidden", 1.1), batch, right, False, _no_timer)
    assert case.status.startswith("wrong: ")
    case = measure.measure(losses.CANDIDATES["eager_full"], batch, right, False, timing.clock_timer)
    assert case.status == measure.OK


def test_a_wrong_loss_is_refused():
    candidate = Candidate("planted", lambda: lambda h, w, t: F.cross_entropy(h @ w.T, t) + 1)
    batch = random_batch(TINY, torch.float32, CPU)
    case = measure.measure(candidate, batch, correctness.exact(batch), True, _no_timer)
    assert case.status.startswith("wrong: loss")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (ValueError("V must be a multiple of 8\nmore"), "failed: ValueError: V must be a multiple of 8"),
    ],
)
def test_what_a_loss_raises_is_its_result(error, status):
    def fail(hidden, weight, targets):
        raise error

    batch = random_batch(TINY, torch.float32, CPU)
    case = measure.measure(Candidate("broken", lambda: fail), batch, correctness.exact(batch), False, _no_timer)
    assert case.status == status


def test_filtering_may_be_less_exact():
    names = ("cce", "cce_exact", "eager_full", "apple_cce")
    cce, cce_exact, eager, apple = (correctness.tolerance(losses.CANDIDATES[name], torch.bfloat16) for name in names)
    assert cce == apple > 1.9e-2
    assert cce_exact == eager < cce < 0.15


# ---- a whole run, on the CPU's clock


@pytest.fixture
def plan(tmp_path):
    """A run on a CPU: everything but the timer is what runs on a card."""

    def timer(run):
        return timing.clock_timer(run, calls=2)

    def make(candidates: list[Candidate], sources: list[session.Source]) -> session.Plan:
        return session.Plan(candidates, sources, CPU, torch.float32, timer, tmp_path / "results", "tune-lce bench --x")

    return make


@pytest.fixture
def _small_checks(monkeypatch):
    """The interpreter takes half a minute for the kernels at the sizes that a card checks."""
    monkeypatch.setattr(correctness, "RAGGED", Shape(70, 40, 333))
    monkeypatch.setattr(correctness, "ALIGNED", Shape(64, 64, 256))


@pytest.mark.usefixtures("_small_checks")
def test_results_are_written_as_documented(plan, tmp_path, capsys):
    torch.save({"saved": (torch.randn(40, 16), torch.randn(90, 16), torch.randint(90, (40,)))}, tmp_path / "x.pt")
    # Compilers take their time: what the ratios are to is full logits here without one.
    baseline = Candidate(losses.BASELINE, losses.CANDIDATES["eager_full"].build)
    candidates = [losses.CANDIDATES["cce"], losses.CANDIDATES["chunked"], baseline]
    names = [candidate.name for candidate in candidates]
    sources = [session.Source("random", TINY), session.Source("file", path=tmp_path / "x.pt")]
    assert session.bench(plan(candidates, sources))

    results = json.loads((tmp_path / "results" / session.RESULTS).read_text())
    assert {"device", "driver", "torch", "triton", "commit", "command", "cases"} <= results.keys()
    assert (results["torch"], results["command"]) == (torch.__version__, "tune-lce bench --x")
    wanted = {
        (name, data, frozen)
        for name in names
        for data in (("random", "random"), ("file", "saved"))
        for frozen in (False, True)
    }
    cases = results["cases"]
    assert {(c["impl"], (c["data"], c["data_name"]), c["frozen_weight"]) for c in cases} == wanted
    assert len(cases) == len(wanted)
    for case in cases:
        assert case["status"] == "ok"
        assert case["shape"] == vars(TINY if case["data"] == "random" else Shape(40, 16, 90))
        assert case["forward_ms"] > 0
        assert case["forward_recording_ms"] > 0
        assert case["forward_backward_ms"] > 0
        assert case["spread_ms"] >= 0
        assert case["ratio_to_torch_compile_full"] > 0
        assert case["peak_mib"] is None  # a card's to tell
        assert 0 < case["grad_error_hidden"] < 1e-4
        assert (case["grad_error_weight"] is None) == case["frozen_weight"]
        assert (case["kept_fraction"] is None) == (case["impl"] != "cce")
        assert case["kept_fraction"] is None or 0 < case["kept_fraction"] <= 1
        if case["impl"] == "torch_compile_full":
            assert case["ratio_to_torch_compile_full"] == 1
    assert [(floor["data_name"], floor["logits_gemm_ms"] > 0) for floor in results["floors"]] == [
        ("random", True),
        ("saved", True),
    ]
    assert results["data"][0]["entropy"] > 0
    assert (tmp_path / "results" / session.PICTURE).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "torch_compile_full" in printed
    assert "2NDV" in printed


def test_a_run_goes_on_past_what_is_wrong_absent_or_broken(plan, tmp_path, capsys):
    def fail(hidden, weight, targets):
        raise RuntimeError("no kernel for this size")

    candidates = [
        _planted("planted", "weight", float("nan")),
        Candidate("absent", lambda: fail, requires="no_such_module"),
        Candidate("broken", lambda: fail),
        losses.CANDIDATES["reference"],
    ]
    assert session.bench(plan(candidates, [session.Source("trained", TINY)]))
    cases = json.loads((tmp_path / "results" / session.RESULTS).read_text())["cases"]
    status = {(case["impl"], case["frozen_weight"]): case["status"] for case in cases}
    assert status["planted", False].startswith("small data: wrong: ")
    assert status["planted", True].startswith("small data: wrong: ")
    assert status["broken", False] == "failed: RuntimeError: no kernel for this size"
    assert status["reference", True] == "ok"
    assert not any(case["forward_ms"] for case in cases if case["impl"] != "reference")
    printed = capsys.readouterr().out
    assert "absent is left out: no_such_module is not installed" in printed
    assert "planted fails" in printed


def test_a_wrong_loss_of_our_own_fails_the_run(plan):
    candidates = [Candidate("ours", _planted("", "hidden", 2.0).build), losses.CANDIDATES["eager_full"]]
    sources = [session.Source("random", TINY)]
    assert session.bench(plan(candidates, sources))
    ours = Candidate("chunked", candidates[0].build, ours=True)
    assert not session.bench(plan([ours], sources))


# ---- the command


@pytest.fixture
def tune_lce(monkeypatch, capsys):
    """Runs ``tune-lce bench`` in this process; returns its exit status and what it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tune-lce", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out + captured.err

    return run


@pytest.mark.usefixtures("_small_checks")
def test_check_only_runs_anywhere(tune_lce):
    names = ("cce", "chunked", "reference", "eager_full", "torchtune_main")
    status, printed = tune_lce("--check-only", "--only", ",".join((*names, "liger")), "--dtype", "float32")
    assert status == 0
    for name in names:
        assert any(line.split()[:1] == [name] and line.split()[-1] == "ok" for line in printed.splitlines()), printed


def test_torchtunes_release_is_right(monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    status, found = measure.check(losses.CANDIDATES["torchtune"], torch.float32, CPU)
    assert status == measure.OK
    assert found.hidden < 1e-6


def test_check_only_fails_on_a_wrong_loss(tune_lce, monkeypatch):
    monkeypatch.setattr(losses, "_ALL", (_planted("eager_full", "hidden", 1.01), losses.CANDIDATES["chunked"]))
    status, printed = tune_lce("--check-only", "--dtype", "float32")
    assert status == 1
    assert "wrong: " in printed


def test_without_a_card_nothing_is_timed(tune_lce, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, printed = tune_lce("--output", tmp_path / "results")
    assert status == 2
    assert "timings come only from a CUDA card" in printed
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "cce,fastest"], "'fastest'"),
        (["--model", "llama9"], "'llama9'"),
        (["--data", "imagined"], "'imagined'"),
        (["--data", "random:10x20"], "'10x20'"),
        (["--data", "file"], "--file PATH"),
        (["--data", "file", "--file", "nowhere.pt"], "nowhere.pt is no file"),
        (["--file", "nowhere.pt"], "--data file"),
        (["--tokens", "0"], "tokens must be at least 1"),
    ],
)
def test_arguments_that_make_no_sense(tune_lce, arguments, said):
    status, printed = tune_lce("--check-only", *arguments)
    assert status == 2
    assert said in printed


def test_data_and_shapes_of_the_command_line(monkeypatch, tmp_path):
    from torchtune_lce.bench import command

    (tmp_path / "x.pt").touch()
    arguments = ["bench", "--file", str(tmp_path / "x.pt"), "--model", "gemma2_2b"]
    arguments += ["--tokens", "4096", "--hidden", "1024"]
    for data in ("trained", "random:8192x4096x128256", "probe:llama3_2_1b", "file"):
        arguments += ["--data", data]
    args = cli.TuneLCEParser()._parser.parse_args(arguments)
    assert command.read_sources(args) == [
        session.Source("trained", Shape(4096, 1024, 256_000)),
        session.Source("random", Shape(8192, 4096, 128_256)),
        session.Source("probe", Shape(4096, 2048, 128_256)),
        session.Source("file", path=tmp_path / "x.pt"),
    ]


def test_presets_only_on_request():
    names = [candidate.name for candidate in losses.select(None)]
    assert {"cce", "cce_exact", "torch_compile", "chunked", "reference"} <= set(names)
    assert {"eager_full", "torch_compile_full", "torchtune", "torchtune_main"} <= set(names)
    assert {"apple_cce", "liger", "quack"} <= set(names)
    assert "cce_kahan_full_c" not in names
    asked = losses.select(["quack", "cce_kahan_full_c"])
    assert [candidate.name for candidate in asked] == ["cce_kahan_full_c", "quack"]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_checkout(tmp_path):
    root = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode:
        assert environment.commit() is None
    else:
        assert environment.commit().removesuffix("+changes") == head.stdout.strip()


@pytest.mark.gpu
def test_a_card_gives_times_and_peaks(device, tmp_path):
    shape = Shape(2048, 512, 32_000)
    candidates = [losses.CANDIDATES[name] for name in ("cce", "chunked", "eager_full", "torch_compile_full")]
    plan = session.Plan(
        candidates, [session.Source("trained", shape)], device, torch.bfloat16, timing.cuda_timer, tmp_path, "x"
    )
    assert session.bench(plan)
    cases = json.loads((tmp_path / session.RESULTS).read_text())["cases"]
    peaks = {case["impl"]: case["peak_mib"] for case in cases if not case["frozen_weight"]}
    # float32 logits of eager alone are 250 MiB.
    assert peaks["eager_full"] > 250 > 150 > peaks["cce"] >= 0
    assert all(case["forward_backward_ms"] > case["forward_ms"] > 0 for case in cases)
