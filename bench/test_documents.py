"""What is written down is true. Contents, in the order of the file:

    README.md               flags, commands, session, exercises
    Figures                 of README.md and LOG.md are those of bench/results
    DETAILS.md, code        tags, table and tests; imports; examples in docstrings
    Scripts                 of this folder: curves, the study

Helpers are those of test_electra.py, and fixtures come by way of conftest.py.
"""

import doctest
import functools
import glob
import gzip
import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
import finetune
import glue
import model
import test_electra
import train
from data import DataConfig
from model import ElectraConfig
from test_electra import (
    HERE,
    Server,
    find_network,
    keep_mrpc,
    launch,
    make_openwebtext,
    make_text,
    pretrain,
    read_log,
    watch,
    write_files,
    write_task,
)

FILES = ["model.py", "data.py", "train.py", "glue.py", "finetune.py"]
README, DETAILS = ((HERE / name).read_text(encoding="utf-8") for name in ("README.md", "DETAILS.md"))


# ============================================================================================================
# README.md


@pytest.mark.parametrize("module, configs", [
    (train, (train.TrainConfig, DataConfig, ElectraConfig)), (finetune, (finetune.FinetuneConfig,))])
def test_the_flags_that_the_readme_names_exist(module, configs, capsys):
    """README's commands have only flags that --help lists, which are all fields but those set by the text."""
    with pytest.raises(SystemExit):
        module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    flags = set(re.findall(r"--[a-z0-9][a-z0-9-]*", text))
    commands = re.findall(rf"python {module.__name__}\.py[^\n`|&]*", README)
    assert commands and set(re.findall(r"--[a-z0-9-]+", " ".join(commands))) <= flags
    derived = {"vocab_size", "type_vocab_size", "cls_token_id", "sep_token_id", "mask_token_id"}
    for name in (field.name for config in configs for field in fields(config)):
        assert (f"--{name.replace('_', '-')}" in flags) == (name not in derived)
    if module is train:
        assert "peak learning rate (0.0005; tiny: 0.001; base: 0.0002; large: 0.0002)" in text


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def make_questions():
    """The bytes of a file in SQuAD's format: a question with an answer, and one without."""
    answer = dict(text="cat", answer_start=4)
    questions = [dict(id="1", question="what sat", is_impossible=False, answers=[answer]),
                 dict(id="2", question="what ran", is_impossible=True, answers=[])]
    return json.dumps(dict(data=[dict(paragraphs=[dict(context="the cat sat", qas=questions)])])).encode()


def test_the_readmes_commands_and_session_run(toy_glue, monkeypatch, quick):
    """The README's commands and Python session run as they are written, on small files and networks."""
    shape = dict(embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=64, max_length=32, batch_size=8, num_train_steps=4, num_warmup_steps=1,
                 finetuning=(3e-4, 0.8))
    tiny = shape | dict(data=["corpus.txt"], vocab="vocab.txt")
    monkeypatch.setattr(train, "SIZES", dict(tiny=tiny, small=shape, base=shape))
    vocab, files = Path("vocab.txt").read_bytes(), {"/owt.tar": make_openwebtext()[1]}
    monkeypatch.setattr(data, "OPENWEBTEXT", {"pinned": ["hub:/owt.tar"]})
    monkeypatch.setattr(data, "BERT_VOCAB", data.BERT_VOCAB | dict(
        address="hub:/vocab.txt", size=len(vocab), sha256=sha256(vocab)))
    files["/vocab.txt"] = vocab
    train.main("--size tiny --max-position-embeddings 128 --out google".split())
    for network in "discriminator", "generator":
        for path in Path("google/tiny", network).iterdir():
            files[f"/google/electra-small-{network}/resolve/main/{path.name}"] = path.read_bytes()
    keep_mrpc(monkeypatch)
    write_task("reviews")
    shutil.copy("reviews/test.tsv", "new.tsv")
    write_files("my_texts", {"a.txt": Path("corpus.txt").read_bytes()})
    for folder in HERE, HERE / "bench", HERE / "extras":
        monkeypatch.syspath_prepend(str(folder))
    import plot

    import squad
    import tagging

    questions, words = make_questions(), b"the B-NP\ncat I-NP\nsat B-VP\n\n" * 4
    monkeypatch.setattr(squad, "SQUAD", "hub:/squad/")
    monkeypatch.setattr(squad, "FILES", dict.fromkeys(squad.FILES, (len(questions), sha256(questions))))
    monkeypatch.setattr(tagging, "CONLL2000", "hub:/conll2000/")
    monkeypatch.setattr(tagging, "SHA256", dict.fromkeys(tagging.SHA256, sha256(words)))
    files |= {f"/squad/{name}": questions for name in squad.FILES}
    files |= {f"/conll2000/{name}.gz": gzip.compress(words) for name in tagging.SHA256}

    def run(command):
        program, script, *flags = shlex.split(command.split(" > ")[0])
        if program == "printf":
            subprocess.run(command, shell=True, check=True)
        elif program == "torchrun":
            status, printed = launch(2, " ".join(flags[2:]), how="").finish()  # not forked
            assert status == 0, printed
        elif script in ("finetune.py", "extras/squad.py", "extras/tagging.py"):
            module = dict(finetune=finetune, squad=squad, tagging=tagging)[Path(script).stem]
            module.main([path for flag in flags for path in glob.glob(flag) or [flag]])  # as a shell does
        elif script == "bench/plot.py":
            monkeypatch.setattr(sys, "argv", [script, *flags])
            plot.main()
        elif script == "train.py":
            shutil.rmtree("out/small", ignore_errors=True)  # the README offers alternatives
            train.main(flags)
        else:
            return script
        return None

    commands = re.findall(r"(?:^ {4}|[`&] ?)((?:python|printf|torchrun) [^`\n]+)", README, re.MULTILINE)
    assert len(commands) > 10
    with Server(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        not_run = {run(command) for command in commands}
    assert not_run <= {None, "bench/study.py"}
    [session], [call] = (re.findall(pattern, README, re.DOTALL)
                         for pattern in (r"```python\n(.*?)```", r"`(finetune\.Predictor.*?)`"))
    namespace = {}
    exec(session, namespace)  # noqa: S102
    assert namespace["output"].is_replaced.shape == (1, len(namespace["ids"]) + 2)
    saved = dict(finetune=finetune, folder=find_network("own-reviews"))
    [(label, probabilities)] = eval(call, saved)  # noqa: S307
    assert label == max(probabilities, key=probabilities.get)


def test_the_readmes_exercises_are_those_that_were_run(monkeypatch):
    """The exercises' figures are in bench/results, and the lines that they change are in the code."""
    monkeypatch.syspath_prepend(HERE / "bench")
    import study

    found = json.loads((HERE / "bench/results/exercises.json").read_text(encoding="utf-8"))
    assert f"`{found['command']}`, commit {found['commit']}" in README
    for name, change in study.EXERCISES.items():
        metrics = dict(unchanged=["auc", "mlm_loss"]).get(name, ["mlm_loss" if name == "MLM only" else "auc"])
        for metric in metrics:
            assert ", ".join(f"{line[metric]:.2f}" for line in found[name]) in README
        if isinstance(change, tuple):
            file, old, new = change
            assert (HERE / file).read_text(encoding="utf-8").count(old) == 1
            assert new.removesuffix(" if") in README
        else:
            assert change in README


# ============================================================================================================
# Figures


def test_the_figures_of_log_and_readme_are_those_of_the_runs(monkeypatch, capsys):
    """LOG.md has the tables of bench/results, with commands and commits."""
    monkeypatch.syspath_prepend(HERE / "bench")
    import study

    log = (HERE / "LOG.md").read_text(encoding="utf-8")
    monkeypatch.setattr(study.plot, "plot", lambda *_: None)
    study.report(None)
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert all(table in log for table in tables)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in study.RESULTS.glob("*.json")]
    assert len(tables) == len(found) > 0
    assert all(stage["command"] in log and f"commit {stage['commit']}" in log for stage in found)


def test_the_figures_of_the_gpu_are_those_of_the_runs():
    """README's and LOG's tables of speed and of scores are made of bench/results/h100."""
    log = (HERE / "LOG.md").read_text(encoding="utf-8")
    names = "steps", "small_20k_dev", "small_20k", "small_20k_again", "small_20k_mlm"
    steps, dev, *runs = (json.loads((HERE / f"bench/results/h100/{name}.json").read_text(encoding="utf-8"))
                         for name in names)
    for name, row in steps["small"]["variants"].items():
        if "padded" not in name:  # it was tried only
            cells = f" {row['ms']:.1f} | {row['steps_per_s']:.1f} | {row['tokens_per_s']:,.0f} "
            assert cells in log.replace("*", ""), name
        if name in ("transformers", "compiled", "compiled, graph, in the real loop"):
            assert f"{row['ms']:.1f} ms" in README
    assert f"{row['tokens_per_s']:,.0f} tokens/s" in README
    metrics = "cola matthews", "mrpc accuracy", "stsb spearman", "sst2 accuracy"
    arms = dict(random="random weights", mlm="20,000 steps", electra="ELECTRA, 20,000 steps",
                again="once more")
    for arm, title in arms.items():
        cells = []
        for metric in metrics:
            scores = 100 * np.array(dev["scores"][metric].get(arm, []))
            deviation = f" ± {scores.std(ddof=1):.1f}" if len(scores) > 1 else ""
            cells.append(f"{scores.mean():.1f}{deviation} ({len(scores)})" if len(scores) else "")
        row = f"| {' | '.join(cells)} |".replace("  ", " ")
        assert all(re.search(rf"{title}\W.*{re.escape(row)}\n", text) for text in (README, log)), row
    published = " | ".join(f"{100 * dev['published'][metric]:.1f}" for metric in metrics)
    assert published in README and published in log
    for run in runs:
        for metric in run["heldout"][0].keys() & {"mlm_loss", "disc_loss", "auc"}:
            assert " | ".join(f"{line[metric]:.3f}" for line in run["heldout"]) in log


# ============================================================================================================
# DETAILS.md and the code


def test_details_in_code_in_the_table_and_in_tests_are_the_same():
    """Each detail, D01 to D35 and extras', has a tagged line, a test, and a row with the official line."""
    code = {name: (HERE / name).read_text(encoding="utf-8") for name in FILES}
    code |= {path.name: path.read_text(encoding="utf-8") for path in (HERE / "extras").glob("*.py")}
    tests = {name for name in dir(test_electra) if name.startswith("test_D")}
    tests |= set(re.findall(r"^def (test_[QT]\d\w+)", code.pop("test_extras.py"), re.MULTILINE))
    in_code = set(re.findall(r"\[([DQT]\d\d)\]", "".join(code.values())))
    rows = dict(re.findall(r"^\| ([DQT]\d\d) \|(.*)", DETAILS, re.MULTILINE))
    in_tests = {tag for name in tests for tag in re.findall(r"[DQT]\d\d", name)}
    assert in_code == set(rows) == in_tests >= {f"D{number:02d}" for number in range(1, 36)}
    official = "https://github.com/google-research/electra/blob/8a46635f32083ada044d7e9ad09604742600ee7b/"
    links = dict(re.findall(rf"^\[(.+)\]: {official}(.+)$", DETAILS, re.MULTILINE))
    for tag, row in rows.items():
        [link] = re.findall(r"\[(\w+\.py:\d+)\]", row)
        file, line = link.split(":")
        assert links[link].rpartition("/")[2] == f"{file}#L{line}", tag
        named = re.findall(r"test_[DQT]\w+", row)
        assert named and {name for name in tests if tag in name} == set(named), tag
        [(file, function)] = re.findall(r"`(\w+\.py)`, `([\w.]+)`", row)
        assert re.search(rf"(def|class) {function.split('.')[-1]}\b", code[file]), (tag, function)


def test_imports_only_go_up_the_list_and_five_packages_are_enough():
    """A file imports only files above it, the standard library, and the five packages of requirements.txt.

    data.py imports one more where some kinds of files need it.
    """
    pins = (HERE / "requirements.txt").read_text().split()
    packages = {pin.split("==")[0] for pin in pins if "==" in pin}
    assert packages == {"torch", "numpy", "tokenizers", "requests", "tqdm"}
    may_import = {"model": set(), "data": {"pyarrow"}, "train": {"model", "data"}, "glue": {"data"},
                  "finetune": {"model", "data", "train", "glue"}, "extras/spans": {"model"},
                  "extras/squad": {"data", "finetune", "glue", "spans", "train"},
                  "extras/tagging": {"data", "finetune", "glue", "model", "train"}}
    for module, allowed in may_import.items():
        code = (HERE / f"{module}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^ *from (\w+)[\w.]* import ", code, re.MULTILINE))
        imported |= set(re.findall(r"^ *import (\w+)[\w.]*(?: as \w+)?(?:  #.*)?$", code, re.MULTILINE))
        assert imported - set(sys.stdlib_module_names) - packages == allowed


def test_examples_in_docstrings_are_right():
    """The worked examples in docstrings run as they are written."""
    results = {module.__name__: doctest.testmod(module) for module in (model, data, train, glue, finetune)}
    assert not any(result.failed for result in results.values())
    assert {name for name, result in results.items() if result.attempted} >= {"model", "data", "finetune"}


# ============================================================================================================
# Scripts


def test_curves_are_plotted(corpus, monkeypatch):
    """bench/plot.py draws the evaluations of runs, and the published curve on request."""
    monkeypatch.syspath_prepend(HERE / "bench")
    import plot

    pretrain()
    pretrain("--objective mlm --out mlm")
    axes = []
    watch(monkeypatch, plot, "draw", lambda axis, *_, **__: axes.append(axis))
    plot.plot({run: plot.read_run(run) for run in ("out/small", "mlm/small")}, "curves.png", official=True)
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    mlm, disc, auc = dict.fromkeys(axes)
    assert [len(axis.lines) for axis in (mlm, disc, auc)] == [5, 3, 2]
    official = plot.read_official()
    assert len(official) == 19 and mlm.lines[-1].get_xdata()[0] == 20_000 * 128 * 128 / 1e6
    logged = [line["auc"] for line in read_log(split="heldout")]
    assert auc.lines[0].get_ydata().tolist() == logged


def test_the_study_runs_its_stages_and_reports_them(toy_glue, monkeypatch, capsys):
    """bench/study.py on a small scale: runs that two stages need are made once; differences have errors."""
    monkeypatch.syspath_prepend(HERE / "bench")
    import study

    def run(command, *_):
        script, *flags = shlex.split(command)
        dict(train=train, finetune=finetune)[Path(script).stem].main(flags)

    count = functools.cache(study.step_against_transformers.flops_per_token)  # it takes a third of a second
    monkeypatch.setattr(study.step_against_transformers, "flops_per_token", count)
    shape = dict(embedding_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=1,
                 intermediate_size=32, max_position_embeddings=32)
    for name, value in dict(run=run, run_all=lambda _, commands: [run(*each) for each in commands],
                            RESULTS=Path("results"), SHAPE=shape, VOCAB=90, LENGTH=32, BATCH=8,
                            LEARNING_RATES=(1e-3, 1e-2), PILOT_FLOPS=2.5e8, MAIN_FLOPS=5e8,
                            FINE_TUNED=dict(sst2=2, stsb=3)).items():
        monkeypatch.setattr(study, name, value)
    write_files("texts", {f"{number}.txt": text.encode() for number, text in enumerate(make_text())})
    options = SimpleNamespace(data="texts", glue="glue", jobs=1, dtype="fp32")
    for stage in "pilots", "main", "sizes", "glue":
        study.STAGES[stage](options)
    found = {path.stem: json.loads(path.read_text()) for path in Path("results").iterdir()}
    assert len(list(Path("out/study").glob("*-flops/*"))) == 2 * 2 + 2 + 2  # a pilot has generator size 0.5
    for runs in (found[stage]["runs"] for stage in ("pilots", "main", "sizes")):
        tokens = {one["curve"][-1]["tokens"] for one in runs.values()}
        assert all(one["curve"][-1]["step"] == one["steps"] > 20 for one in runs.values()) and len(tokens) > 1
    assert [len(found["glue"]["sst2 accuracy"][name]) for name in ("electra", "mlm", "random")] == [2, 2, 2]
    capsys.readouterr()
    study.report(options)
    lines = [line for line in capsys.readouterr().out.splitlines() if " | " in line]
    table = dict(line.strip("| ").split(" | ", 1) for line in lines)
    ours, theirs = (np.array(found["glue"]["stsb spearman"][name]) * 100 for name in ("electra", "mlm"))
    error = math.sqrt(ours.var(ddof=1) / 3 + theirs.var(ddof=1) / 3)
    assert table["ELECTRA − MLM"].endswith(f"{ours.mean() - theirs.mean():+.1f} ± {error:.1f}")
    assert Path("results/main.png").read_bytes().startswith(b"\x89PNG")


def test_the_studys_arms_have_equal_flops(monkeypatch):
    """Steps of both arms at a budget: a matrix product of n weights is 2n operations, 4n more backward."""
    monkeypatch.syspath_prepend(HERE / "bench")
    import study

    length, slots, vocab, layers = study.LENGTH, 9, study.VOCAB, 2  # int(0.155 x 64) slots

    def encoder(H):
        return layers * (4 * H * H + 2 * H * 4 * H + 2 * length * H)  # projections, FFN, attention

    head = (128 * vocab + 128 * 128) * slots / length
    assert study.steps_for(1e14, "mlm") == int(1e14 / (6 * (encoder(128) + head) * length * study.BATCH))
    generator = 128 * 64 + encoder(64) + (128 * vocab + 64 * 128) * slots / length
    both = generator + encoder(128) + 128 * 128 + 128
    assert study.steps_for(1e14, "electra") == int(1e14 / (6 * both * length * study.BATCH))
