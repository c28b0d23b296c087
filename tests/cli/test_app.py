"""The command line as users and scripts meet it: exit codes, one sentence on stderr, one document on stdout."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file

import prunecli
from prunecli.cli.console import reported
from prunecli.errors import InterruptedRunError
from prunecli.training.recommended_lr import short_peak
from toys.jobs import JOB, call, sentence


@pytest.fixture
def run(toy_run: Path) -> Path:
    return toy_run


# ---------------------------------------------------------------------------------------------- the main job


def test_a_run_leaves_the_promised_folder(run):
    names = {path.name for path in run.iterdir()}
    promised = "model.safetensors config.json plan.json report.json report.html recipe.yaml checkpoints log.jsonl"
    assert names == {*promised.split(), "reference.safetensors"}
    assert not [path for path in run.rglob("*") if path.suffix in (".pt", ".pth", ".pkl", ".tmp")]


def test_auto_tells_which_recoveries_it_tried_and_keeps_one_at_most(run):
    rows = json.loads((run / "report.json").read_text())["recovery"]
    assert [row["name"] for row in rows] == ["lstsq", "onepass", "lstsq+onepass", "lstsq+blend", "blend", "orthp"]
    assert sum(row["kept"] for row in rows) <= 1
    assert all(row["rule"].startswith("kept: " if row["kept"] else "left out: ") for row in rows)
    assert len({row["loss_before"] for row in rows}) == 1, "all are compared with the same pruned net"
    assert sum("optimiser steps" in row["rule"] and " against " in row["rule"] for row in rows) >= 1


def test_the_report_has_the_promised_keys(run):
    report = json.loads((run / "report.json").read_text())
    promised = "model base final stages target layers lr latency verify recipe_sha256 versions seed warnings"
    assert set(promised.split()) <= set(report)
    assert [stage["name"] for stage in report["stages"]] == ["dense", "pruned", "recovered", "finetuned"]
    stage = report["stages"][0]
    assert {"name", "seconds", "params", "macs", "bytes", "top1", "top5", "loss", "jsv"} <= set(stage)
    assert {"mean", "std", "min", "max", "condition", "samples"} <= set(stage["jsv"])
    assert (stage["jsv"]["method"], stage["jsv"]["mean_error"]) == ("exact", None)
    assert report["verify"] == {"reload_max_abs_diff": 0.0, "classes_equal": True, "ok": True}
    assert report["final"]["params"] < report["base"]["params"]
    assert report["latency"] is None


def test_the_run_reloads_bit_equal_and_verifies(run):
    model = prunecli.load(run)
    assert not model.training
    for name, tensor in load_file(run / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor)
    result = call("verify", str(run), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["ok"] is True


def test_fine_tuning_learns(run):
    stages = {stage["name"]: stage for stage in json.loads((run / "report.json").read_text())["stages"]}
    assert stages["finetuned"]["loss"] < stages["pruned"]["loss"]


def test_a_tampered_model_does_not_verify(run, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "reference.safetensors", "model.safetensors"):
        (copy / name).write_bytes((run / name).read_bytes())
    tensors = load_file(copy / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, copy / "model.safetensors")
    result = call("verify", str(copy), full=True)
    assert result.exit_code == 4
    assert "not the file that was exported" in sentence(result)


def test_a_run_can_be_pruned_again(run, tmp_path):
    options = ["--target=ratio=0.5", "prune.round_to=1", f"--out={tmp_path / 'again'}", "--json"]
    result = call("compress", str(run), *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    first = json.loads((run / "report.json").read_text())
    assert report["base"]["params"] == first["final"]["params"]
    assert report["final"]["params"] < report["base"]["params"]
    assert any("nothing was fine-tuned" in warning for warning in report["warnings"])
    assert prunecli.load(tmp_path / "again")


def test_a_dry_run_writes_nothing_and_shows_the_costs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--no-pretrained", "--target=macs=50%", "--round-to=1", "--dry-run", "--json"]
    result = call("compress", "lenet5_relu", *options)
    assert result.exit_code == 0, result.stderr
    plan = json.loads(result.stdout)["plan"]
    assert plan["predicted"]["macs"] / plan["base"]["macs"] == pytest.approx(0.5, abs=0.005)
    assert not list(tmp_path.iterdir())


def test_the_resolved_recipe_is_shown_and_flags_win(tmp_path):
    (tmp_path / "job.yaml").write_text("model: resnet18\nseed: 1\nfinetune: {epochs: 3, lr: 0.1}\n")
    recipe = f"--recipe={tmp_path / 'job.yaml'}"
    result = call("compress", recipe, "seed=2", "finetune.epochs=4", "--seed=5", "--print-config")
    assert result.exit_code == 0, result.stderr
    shown = prunecli.Recipe.from_mapping(__import__("yaml").safe_load(result.stdout))
    assert (shown.seed, shown.finetune.epochs, shown.finetune.lr) == (5, 4, 0.1)


def test_eval_spectrum_lr_and_inspect_answer_in_json(run):
    accuracy = json.loads(call("eval", str(run), "--data=digits", "--limit=64", "--json").stdout)
    assert accuracy["samples"] == 64
    spectrum = json.loads(call("spectrum", str(run), "--data=digits", "--samples=2", "--json").stdout)
    assert len(spectrum["jacobian"]) == 2
    assert spectrum["jsv"]["samples"] == 2
    rate = json.loads(call("lr", str(run), "--data=digits", "--json").stdout)
    evidence = rate["evidence"]
    assert (evidence["epochs"], evidence["steps"]) == (10, 10 * math.ceil(evidence["steps"] / 10))
    assert rate["recommended"] == pytest.approx(short_peak(evidence["steps"], evidence["removed_channels"]), rel=0.03)
    assert evidence["lost_top1"] is None, "random weights know nothing that could be lost"
    groups = json.loads(call("inspect", "lenet5_relu", "--json").stdout)["groups"]
    assert {group["width"] for group in groups} == {6, 16, 120, 84}


def test_the_rate_follows_from_the_base_s_own_where_that_is_told(run):
    known = json.loads(call("lr", str(run), "finetune.original={lr: 0.4, epochs: 200}", "--json").stdout)
    assert known["recommended"] == pytest.approx(0.04)
    assert "A tenth of the base's peak rate 0.4 (given)" in known["rule"]
    unknown = json.loads(call("lr", str(run), "--json").stdout)
    assert unknown["recommended"] == pytest.approx(0.01)
    assert "0.1 (assumed" in unknown["rule"]


def test_tables_are_for_people(run):
    for arguments in (["inspect", "lenet5_relu"], ["lr", str(run)], ["verify", str(run)], ["recipes", "ls"]):
        result = call(*arguments)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.strip()


def test_finetune_alone(run, tmp_path):
    small = ["data.train_limit=64", "data.val_limit=32", "spectrum.samples=0"]
    result = call("finetune", str(run), "--data=digits", "--epochs=1", "--json", *small, f"--out={tmp_path / 'tuned'}")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [stage["name"] for stage in report["stages"]] == ["dense", "finetuned"]
    assert report["target"] is None


# ---------------------------------------------------------------------------------------------- folders


def test_a_finished_run_is_not_overwritten_without_force(run):
    result = call("compress", *JOB, f"--out={run}")
    assert result.exit_code == 2
    assert "holds a finished run" in sentence(result)


def test_a_folder_with_other_files_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    result = call("compress", *JOB, f"--out={tmp_path}", "--force")
    assert result.exit_code == 2
    assert (tmp_path / "thesis.tex").read_text() == "years"


def test_resume_needs_something_to_resume(tmp_path):
    result = call("compress", *JOB, f"--out={tmp_path / 'none'}", "--resume")
    assert result.exit_code == 2
    assert "no run to resume" in sentence(result)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_place_that_cannot_be_written_is_one_sentence():
    result = call("compress", *JOB, "--out=/proc/nowhere")
    assert result.exit_code == 1
    assert "Cannot write /proc/nowhere" in sentence(result)


# ---------------------------------------------------------------------------------------------- bad input


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def weights_file(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / {"pickle": "w.pth", "truncated": "w.safetensors", "classes": "w.safetensors"}.get(kind, "w.pth")
    state = prunecli_state()
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Exploit(tmp_path / "executed")}))
    elif kind == "truncated":
        save_file(state, path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "nan":
        torch.save({name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}, path)
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "classes":
        head = [name for name, tensor in state.items() if tensor.shape[0] == 10]
        save_file({name: t.repeat(2, *[1] * (t.dim() - 1)) if name in head else t for name, t in state.items()}, path)
    return path


def prunecli_state() -> dict[str, torch.Tensor]:
    from prunecli.models.load import load_model

    return dict(load_model("lenet5_relu", pretrained=False).model.state_dict())


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("missing", 2, "w.pth"),
        ("truncated", 1, "w.safetensors"),
        ("pickle", 1, "w.pth"),
        ("nan", 1, "w.pth are not finite, first in conv1.weight"),
        ("empty", 1, "w.pth"),
        ("folder", 1, "w.pth is not a file"),
        ("classes", 1, "num_classes=20"),
    ],
)
def test_bad_weights(tmp_path, kind, code, said):
    path = weights_file(tmp_path, kind)
    result = call("compress", "lenet5_relu", f"--weights={path}", "--target=ratio=0.5", f"--out={tmp_path / 'run'}")
    assert result.exit_code == code
    assert said in sentence(result)
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["resnet18x", "--no-pretrained", "--target=ratio=0.5"], 2, "resnet18"),
        (["lenet5_relu", "--target=ratio=0.5"], 2, "--weights"),
        (["lenet5_relu", "--no-pretrained"], 2, "--target"),
        (["lenet5_relu", "--no-pretrained", "--target=latency=5ms"], 2, "bench"),
        (["lenet5_relu", "--no-pretrained", "--target=params=10"], 3, "each"),
        (
            ["lenet5_relu", "--no-pretrained", "--target=ratio=0.5", "prune.select=[nothing]"],
            5,
            "The pattern 'nothing' matches no group",
        ),
        (["lenet5_relu", "--no-pretrained", "--target=ratio=0.5", "finetune.epoch=3"], 2, "'epochs'"),
        (["lenet5_relu", "--no-pretrained", "--target=ratio=0.5", "--epochs=3"], 2, "--data"),
        (["lenet5_relu", "--no-pretrained", "--target=ratio=0.5", "--lr=fast"], 2, "--lr"),
        (["lenet5_relu", "--no-pretrained", "--target=ratio=0.5", "--device=cuda:99"], 2, "CUDA"),
        (["lenet5_relu", "--no-pretrained", "--target=ratio=0.5", "--data=/nowhere/at/all"], 2, "/nowhere/at/all"),
        (["a", "b", "--target=ratio=0.5"], 2, "One model"),
        (["--recipe=quickstrat"], 2, "'quickstart'"),
    ],
)
def test_wrong_words_are_named(tmp_path, monkeypatch, arguments, code, said):
    monkeypatch.chdir(tmp_path)
    result = call("compress", *arguments)
    assert result.exit_code == code, sentence(result)
    assert said in sentence(result)
    assert not result.stdout
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_diverging_run_stops_and_keeps_its_state(tmp_path):
    result = call("compress", *JOB, "--lr=1e12", "recover.steps=[]", f"--out={tmp_path / 'run'}")
    assert result.exit_code == 1
    assert "learning rate" in sentence(result)
    assert (tmp_path / "run" / "plan.json").is_file()
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--recover=bn"], "Recovery step bn"),
        (["--resume", "--force"], "contradict"),
        (["--resume"], "no unfinished run of lenet5_relu"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    result = call("compress", "lenet5_relu", "--no-pretrained", "--target=ratio=0.5", *arguments)
    assert result.exit_code == 2
    assert said in sentence(result)
    assert not list(tmp_path.iterdir())


def test_data_without_training_images_is_refused_before_any_work(tmp_path):
    for label in range(10):
        folder = tmp_path / "data" / "val" / str(label)
        folder.mkdir(parents=True)
        Image.new("L", (32, 32), label).save(folder / "one.png")
    options = ["--no-pretrained", "--target=ratio=0.5", "--data", str(tmp_path / "data"), f"--out={tmp_path / 'run'}"]
    result = call("compress", "lenet5_relu", *options)
    assert result.exit_code == 2
    assert "no training images to fine-tune with" in sentence(result)
    assert not (tmp_path / "run").exists()


def test_resume_alone_asks_for_the_folder():
    result = call("compress", "--resume")
    assert result.exit_code == 2
    assert "Give --out DIR" in sentence(result)


def test_a_finished_run_is_not_resumed(run):
    before = (run / "report.json").read_bytes()
    result = call("compress", "--resume", f"--out={run}")
    assert result.exit_code == 2
    assert "is finished: there is nothing to resume" in sentence(result)
    assert (run / "report.json").read_bytes() == before


@pytest.mark.parametrize("command", ["lr", "spectrum"])
def test_a_run_with_a_damaged_config_is_named(run, tmp_path, command):
    (tmp_path / "recipe.yaml").write_bytes((run / "recipe.yaml").read_bytes())
    (tmp_path / "config.json").write_text((run / "config.json").read_text()[:200])
    (tmp_path / "report.json").write_text("{}")
    result = call(command, str(tmp_path))
    assert result.exit_code == 1
    assert "config.json is not readable JSON" in sentence(result)


# ---------------------------------------------------------------------------------------------- the process


def in_a_process(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PRUNE": f"{sys.executable} -m prunecli", **environment}
    root = Path(__file__).parents[2]
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=variables, cwd=root, timeout=120
    )


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_a_block_that_was_freed_is_used_again_without_page_faults():
    program = """
import resource, sys
from prunecli.cli.console import settle_process
settle_process()
def used(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(size)
    block[::4096] = bytes(len(block[::4096]))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, *others = [used(200_000_000) for _ in range(5)]
print(first, max(others))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, later = map(int, done.stdout.split())
    assert later < first / 10


def test_help_needs_no_torch_and_answers_at_once():
    began = time.perf_counter()
    done = in_a_process(f"{sys.executable} -X importtime -m prunecli --help")
    seconds = time.perf_counter() - began
    assert "compress" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "timm", "numpy", "matplotlib", "sklearn", "accelerate", "pydantic"}
    assert seconds < 2  # 0.1 s on an idle core; the rest is for busy ones


@pytest.mark.parametrize("options", ["", " --json"])
def test_a_reader_that_has_seen_enough_is_no_failure(options):
    done = in_a_process(f"$PRUNE recipes ls{options} | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout == "0\n"
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("options", ["", " --json"])
def test_an_output_that_cannot_be_written_is_one_sentence(options):
    done = in_a_process(f"$PRUNE recipes ls{options} > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "Error: Cannot write to standard output: No space left on device.\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams_are_no_failure(closed):
    assert in_a_process(f"$PRUNE recipes ls {closed}").returncode == 0


def test_an_output_without_unicode_is_no_failure():
    assert in_a_process("$PRUNE recipes ls", PYTHONIOENCODING="ascii").returncode == 0


def test_json_is_alone_on_stdout_whatever_libraries_print(run, monkeypatch):
    from prunecli.run import verify as verification

    def chatty(*arguments):
        sys.stdout.write("Files already downloaded and verified\n")
        logging.getLogger("timm").warning("a library's own warning")
        logging.getLogger("prunecli").warning("Image x.png cannot be read")
        return verification.verify_here(*arguments)

    monkeypatch.setattr("prunecli.run.verify.verify", chatty)
    result = call("verify", str(run), "--json", full=True)
    assert json.loads(result.stdout)["ok"] is True
    assert result.stderr == "Files already downloaded and verified\nwarning: Image x.png cannot be read\n"


def test_quiet_is_silent(run, tmp_path):
    options = ["--target=ratio=0.5", "prune.round_to=1", f"--out={tmp_path / 'again'}", "--quiet", "--json"]
    result = call("compress", str(run), *options)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert json.loads(result.stdout)


def test_lines_in_a_log_are_not_broken(run):
    said = call("compress", *JOB, f"--out={run}/plan.json/{'very-long-name' * 12}").stderr
    assert len(said.splitlines()) == 1
    assert len(said) > 160


# ---------------------------------------------------------------------------------------------- kill and resume


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "prunecli", "compress", *JOB, "--epochs=6", "finetune.checkpoint_every=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, f"--out={out}", *more], stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_in_the_middle_of_fine_tuning_and_resumed_gives_the_same_weights(tmp_path):
    whole = start(tmp_path / "whole")
    _, said = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    broken = start(tmp_path / "broken")
    saved = tmp_path / "broken" / "checkpoints" / "finetune"
    wait_for(lambda: saved.is_dir() and len(list(saved.rglob("*.safetensors"))) > 0, broken)
    broken.send_signal(signal.SIGKILL)
    broken.communicate()
    assert not (tmp_path / "broken" / "report.json").exists()
    resumed = subprocess.run(
        [sys.executable, "-m", "prunecli", "compress", "--resume", f"--out={tmp_path / 'broken'}"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert resumed.returncode == 0, resumed.stderr
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = load_file(tmp_path / "broken" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_an_interrupt_ends_with_130_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path / "run")
    wait_for((tmp_path / "run" / "plan.json").exists, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "--resume" in said
    assert "Traceback" not in said


def catches_sigterm(process: subprocess.Popen[str]) -> bool:
    """Whether a handler is in place: before that, the process is Python starting and not yet prunecli."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    mask = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
    return bool(mask >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.0, 1.0, 2.5])
def test_an_interrupt_while_loading_is_one_sentence(tmp_path, number, seconds):
    process = start(tmp_path / "run")
    wait_for(lambda: catches_sigterm(process), process)
    time.sleep(seconds)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("Error: Interrupted")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_library_swallows_is_raised_again(number, capsys):
    def work():
        with suppress(BaseException):
            signal.raise_signal(number)
        time.sleep(60)

    with pytest.raises(typer.Exit) as caught, reported():
        work()
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err == "Error: Interrupted.\n"


def test_an_interrupt_does_not_disturb_what_is_put_in_order_after_it():
    former = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    saved = []

    def work():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            time.sleep(1.0)
            saved.append("state")
            raise InterruptedRunError("Interrupted.") from None

    with pytest.raises(typer.Exit) as caught, reported():
        work()
    assert (caught.value.exit_code, saved) == (130, ["state"])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == former
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.slow
def test_a_second_interrupt_ends_the_process_at_once(tmp_path):
    process = start(tmp_path / "run")
    wait_for((tmp_path / "run" / "model.safetensors").exists, process)  # verification takes seconds
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in said


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_method_that_trains_before_the_cut_needs_data(dry, tmp_path):
    job = ["lenet5_relu", "--no-pretrained", "--target=ratio=0.5", "--method=tpp", f"--out={tmp_path / 'run'}", *dry]
    done = call("compress", *job)
    assert done.exit_code == 2
    assert sentence(done).endswith("Error: Method tpp trains before the cut, so it needs data. Give --data.")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_how_long_the_phases_are():
    job = [part for part in JOB if part != "--epochs=2"]
    done = call("compress", *job, "--method=greg", "method.variant=2", "--dry-run", "--json")
    assert done.exit_code == 0
    phases = json.loads(done.stdout)["phases"]
    assert [(phase["name"], phase["steps"], phase["epochs"]) for phase in phases] == [
        ("grow", 10_000, 1250.0),
        ("push", 109_000, 13625.0),
    ]
    shown = call("compress", *job, "--method=tpp", "--dry-run").stdout
    assert "110,000 steps = 13750 epochs at LR 0.001" in " ".join(shown.split())
    trial = call("compress", *(part for part in job if "target" not in part), "--method=abp", "--dry-run").stdout
    assert "50,000 steps = 6250 epochs at LR 0.1 ! " in " ".join(trial.split())
    assert "Which channels leave is yet to be learnt." in " ".join(trial.split())
    short = call("compress", *job, "--method=tpp", "method.stabilise=399", "--dry-run")
    assert short.exit_code == 2
    assert "too few to set 4 groups to zero" in sentence(short)
