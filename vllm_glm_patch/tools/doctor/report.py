"""Puts the facts of `facts` together: what is patched on this vLLM, and what is in the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ... import catalog
from ...errors import UserError
from ...installation import asked
from ...settings import Settings
from ...upstream import find_installed
from ..output import Table
from ..scan import Finding, installed, judge
from ..scan.cli import WORDS
from ..scan.evidence import wanted_files
from . import facts

IN_ADDITION = "Keys of --additional-config '{\"glm_patch\": {...}}' replace these when vLLM starts."


@dataclass
class Report:
    """What `doctor` says."""

    packages: list[tuple[str, str, str]]
    cards: list[str]
    no_cards: str
    findings: list[Finding]
    decisions: list[catalog.Decision]
    settings: list[tuple[str, str, str]]
    plugins: list[facts.Plugin]
    problems: list[str] = field(default_factory=list)
    settings_error: str = ""

    @property
    def exit_code(self) -> int:
        """2 for a wrong setting, 1 for anything else that is in the way, 0 for nothing."""
        return 2 if self.settings_error else 1 if self.problems else 0

    def tables(self) -> list[Table]:
        """The report as tables."""
        cards = [(card,) for card in self.cards] or [(f"none: {self.no_cards}",)]
        decided = {decision.id: decision for decision in self.decisions}
        defects = [(f.id, WORDS[f.present], *_patch_cells(decided.get(f.id), f)) for f in self.findings]
        faster = [_faster_cells(d) for d in self.decisions if d.patch is not None and not d.patch.defect]
        plugins = [(p.name, p.group, p.package, "loaded" if p.loaded else "left out by VLLM_PLUGINS") for p in self.plugins]
        return [
            Table("Installed", ("", "", ""), self.packages),
            Table("Cards", ("",), cards),
            Table("Defects of this vLLM", ("defect", "here", "patch", "why"), defects or [("none known", "", "", "")]),
            Table("Made faster", ("patch", "here", "what"), faster or [("nothing", "", "")]),
            Table(f"Settings. {IN_ADDITION}", ("setting", "value", "from"), self.settings),
            Table("Plugins of vLLM", ("name", "group", "package", "state"), plugins or [("none", "", "", "")]),
            Table("Verdict", ("",), [(problem,) for problem in self.problems] or [("Nothing is in the way.",)]),
        ]

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "packages": {name: {"version": version, "where": where or None} for name, version, where in self.packages},
            "cards": self.cards,
            "no_cards": self.no_cards or None,
            "defects": [{"id": f.id, "present": f.present, "why": f.why} for f in self.findings],
            "patches": [{"id": d.id, "state": d.state, "reason": d.reason} for d in self.decisions],
            "settings": {name: {"value": value, "from": origin} for name, value, origin in self.settings},
            "plugins": [
                {"name": p.name, "group": p.group, "value": p.value, "package": p.package, "loaded": p.loaded, "ours": p.ours}
                for p in self.plugins
            ],
            "problems": self.problems,
        }


def make() -> Report:
    """Examine this machine and this Python."""
    found = find_installed()
    settings, settings_error = Settings(), ""
    try:
        settings = Settings.from_environment()
    except UserError as error:
        settings_error = str(error)
    cards, no_cards = facts.cards()
    report = Report(
        packages=facts.packages(found),
        cards=cards,
        no_cards=no_cards,
        findings=judge(installed(found, wanted_files())) if found else [],
        decisions=[asked(d, settings) for d in catalog.decide(found, settings)] if found and not settings_error else [],
        settings=[] if settings_error else facts.setting_rows(settings),
        plugins=facts.plugins(),
        settings_error=settings_error,
    )
    report.problems = [
        *_problems_of_settings(report),
        *_problems_of_vllm(report, found is not None),
        *_problems_of_plugin(report),
    ]
    return report


def _patch_cells(decision: catalog.Decision | None, finding: Finding) -> tuple[str, str]:
    if decision is None:
        return "not decided", f"{finding.why}; a setting is wrong"
    if decision.state in (catalog.REFUSED, catalog.SWITCHED_OFF):
        return decision.state, decision.reason
    return ("applied when vLLM starts" if decision.state == catalog.APPLY else decision.state), finding.why


def _faster_cells(decision: catalog.Decision) -> tuple[str, str, str]:
    if decision.state == catalog.APPLY:
        return decision.id, "applied when vLLM starts", decision.patch.title if decision.patch else ""
    return decision.id, decision.state, decision.reason


def _problems_of_settings(report: Report) -> list[str]:
    return [report.settings_error] if report.settings_error else []


def _problems_of_vllm(report: Report, there_is_vllm: bool) -> list[str]:
    known = catalog.releases()
    if not there_is_vllm:
        return [f"No vLLM is installed in this Python. Install one from {known[0]} to {known[-1]} beside this package."]
    refused: dict[str, list[str]] = {}
    for decision in report.decisions:
        if decision.state == catalog.REFUSED:
            refused.setdefault(decision.reason, []).append(decision.id)
    hint = "Install a vllm-glm-patch made for this vLLM, or an unchanged vLLM"
    return [f"Refused: {', '.join(ids)}: {reason}. {hint}." for reason, ids in refused.items()]


def _problems_of_plugin(report: Report) -> list[str]:
    ours = [plugin for plugin in report.plugins if plugin.ours]
    if not ours:
        return [
            "vLLM will not find the plugin: vllm-glm-patch is not installed in this Python, only importable. Use pip install."
        ]
    if not any(plugin.loaded for plugin in ours):
        return [f"VLLM_PLUGINS leaves the plugin out. Add {ours[0].name} to it (no spaces), or unset it."]
    return []
