"""`hf-tpsp env`, and the sentence about versions that the suite was not run on."""

import importlib.metadata

import pytest

from hf_tpsp.cli import main
from hf_tpsp.config import TPSPConfig
from hf_tpsp.integrations import session
from hf_tpsp.upstream import versions


@pytest.fixture
def another_torch(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.99.0" if name == "torch" else version(name))
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: ["torch<2.14,>=2.13", "peft>=0.1", 'trl>=1; extra == "trl"']
    )


def test_env_prints_versions_ranges_and_variables(capsys, monkeypatch, another_torch):
    monkeypatch.setenv("HF_TPSP_LOSS", "chunked")
    main(["env"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert rows["torch"].split()[1:] == ["2.99.0", "NOT", "TESTED:", "<2.14,>=2.13"]
    assert rows["peft"].split()[2:] == ["tested:", ">=0.1"]
    assert {"python", "transformers", "accelerate", "datasets", "bitsandbytes", "CUDA", "devices"} <= rows.keys()
    assert "HF_TPSP_LOSS=chunked" in lines


def test_the_versions_that_are_installed_here_are_tested():
    assert versions.untested() is None


@pytest.mark.parametrize("rank", ["0", "1"])
def test_enable_names_an_untested_version_once_on_the_main_process(monkeypatch, another_torch, rank):
    said = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(session.logger, "warning_once", said.append)
    session.start(TPSPConfig(tp_size=2)).disable()
    assert len(said) == (rank == "0")
    assert all("torch 2.99.0 (tested: <2.14,>=2.13)" in sentence and "peft" not in sentence for sentence in said)


def test_a_copy_that_is_not_installed_says_nothing(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert versions.untested() is None
