"""Healthy models yield no finding, sick ones the right ones; every finding is whole, its code runs."""

from __future__ import annotations

import copy
import math

import findings_census
import pytest
import torch
from findings_census import HEALTHY, PATIENTS, SICK, Patient, Visit
from torch import nn

import gradflow
from gradflow.cells import CELLS

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 17  # not among those the command prints
NO_DECADES = {  # what has no size in powers of ten
    "not-finite", "no-recurrence", "few-channels", "saturated-activations", "saturated-gates",
    "idle-units", "hidden-paths-drown-cell", "unread", "reads-one-sequence", "reads-past-packed",
    "reads-first-step", "reads-after-end", "reads-few-sequences",
}  # fmt: skip


@pytest.fixture(scope="module")
def visits() -> dict[str, Visit]:
    return {}


@pytest.mark.parametrize("patient", PATIENTS, ids=str)
def test_findings_are_right(patient: Patient, visits: dict[str, Visit]) -> None:
    visit = visits[patient.name] = patient.seen(SEED)
    assert patient.complaint(visit) == ""
    for finding in visit.findings:
        assert finding.where
        assert finding.message
        assert finding.value is not None
        assert (finding.threshold is None) == (finding.basis == "")
        if finding.low is not None and not math.isnan(finding.low):
            assert finding.low <= finding.value <= finding.high
        assert (finding.severity is None) == (finding.name in NO_DECADES)
        assert runs(finding.code, visit), finding.code


def runs(code: str, visit: Visit) -> bool:
    """Whether a line of advice runs on a copy of the model, its input and its states."""
    state = torch.zeros(visit.x.shape[1], 4, requires_grad=True)
    optimised = copy.deepcopy(visit.model)
    optimised(visit.x)[0].sum().backward()
    width = visit.x.shape[2]
    names = {
        "layers": [nn.GRU(width, width)],
        "model": optimised, "x": visit.x, "y": visit.x, "h": state, "c": state,
        "output": optimised(visit.x)[0], "outputs": list(optimised(visit.x)[0]), "packed": visit.x,
        "lengths": torch.full((visit.x.shape[1],), len(visit.x)), "x_t": visit.x[0],
        "torch": torch, "nn": nn, "gradflow": gradflow, "print": lambda *shown: None,
    }  # fmt: skip
    before = torch.is_anomaly_enabled()
    try:
        exec(code, names)  # noqa: S102 — must run as printed
    finally:
        torch.autograd.set_detect_anomaly(before)
    return True


def test_enough_of_both_and_every_finding_is_expected_somewhere() -> None:
    assert len(HEALTHY) >= 10
    assert len(SICK) >= 14
    expected = set().union(*(patient.expected for patient in SICK))
    menu = {"parity-failed", "depends-on-input"}  # have tests of their own
    assert names_in_the_menu() == expected | menu | {"activations-contract"}


def names_in_the_menu() -> set[str]:
    """All names that findings are given in the source."""
    import re
    from pathlib import Path

    from gradflow import analyzer

    source = "".join(file.read_text() for file in Path(analyzer.__file__).parent.rglob("*.py"))
    given = re.findall(r'(?:name=|_finding\(e, )"([a-z-]+)"', source)
    given += ["vanishing", "exploding"]  # `_of_verdict` names them by the verdict
    keepers = [spec.keeper for spec in CELLS.values() if spec.keeper is not None]
    return set(given) | {f"{keeper.name}-gates-{keeper.fault}" for keeper in keepers}


def test_a_wrong_finding_would_be_seen() -> None:
    healthy, sick = HEALTHY[0], SICK[0]
    well, ill = healthy.seen(SEED), sick.seen(SEED)
    assert healthy.complaint(ill).startswith("found vanishing")
    assert "verdict vanishing" in healthy.complaint(ill)
    assert sick.complaint(well) == "missed vanishing"


def test_the_command_says_how_often(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, patients in (("HEALTHY", HEALTHY[:1]), ("SICK", SICK[:1])):
        monkeypatch.setattr(findings_census, name, patients)
    monkeypatch.setattr(findings_census, "PATIENTS", [HEALTHY[0], SICK[0]])
    findings_census.main(1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "healthy models without a finding: 1 of 1",
        "sick models told rightly: 1 of 1",
    ]
