"""What `make audit` makes of licences and of tools that are not there or find something."""

import json
import subprocess
from email.message import Message
from types import SimpleNamespace

import pytest

import audit


@pytest.mark.parametrize(
    ("expression", "free"),
    [
        ("MIT", True),
        ("MIT/Apache-2.0", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("(MIT OR GPL-3.0-only) AND Unicode-3.0", True),
        ("GPL-3.0-only OR MIT", True),
        ("GPL-3.0-only AND MIT", False),
        ("(GPL-3.0-only AND MIT) OR AGPL-3.0-only", False),
        ("LicenseRef-MIT-like", False),
        ("", False),
    ],
)
def test_expressions(expression, free):
    assert audit.is_free(expression) == free


@pytest.mark.parametrize(
    ("fields", "free"),
    [
        ({"License-Expression": "MIT AND GPL-2.0-only", "Classifier": "License :: OSI Approved :: MIT License"}, False),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, True),
        ({"License": "Proprietary\n\nParts are under the MIT License"}, False),
        ({"Classifier": "Topic :: Scientific/Engineering"}, False),
    ],
)
def test_metadata(fields, free):
    about = Message()
    for name, value in fields.items():
        about[name] = value
    assert audit.licence(SimpleNamespace(metadata=about))[1] == free


@pytest.fixture
def answers(monkeypatch):
    """Command without options -> what it answers: `(exit code, output)`."""
    found = {}

    def run(command, **_):
        code, text = next(
            answer for start, answer in found.items() if " ".join(map(str, command[1:])).startswith(start)
        )
        return subprocess.CompletedProcess(command, code, text, text)

    monkeypatch.setattr(audit.subprocess, "run", run)
    monkeypatch.setattr(audit.shutil, "which", lambda _: "there")
    monkeypatch.setattr(audit.util, "find_spec", lambda _: "there")
    return found


def test_what_could_not_be_asked_is_said(answers, capsys):
    answers["-m pip_audit"] = 0, json.dumps({"dependencies": [{"name": "a", "skip_reason": "no network"}]})
    answers |= {"deny check bans": (0, ""), "deny fetch": (1, "no network")}
    assert audit.vulnerabilities({}) == audit.crates() == []
    assert capsys.readouterr().out.count("audit: skipped") == 2


def test_what_is_found_is_told(answers, capsys):
    found = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}
    answers["-m pip_audit"] = 1, json.dumps({"dependencies": [found]})
    advisory = "a connection over the network times out"  # an advisory's words, not a failure to fetch it
    answers |= {
        "deny check bans": (0, ""),
        "deny fetch": (0, ""),
        "deny check --disable-fetch advisories": (1, advisory),
    }
    assert audit.vulnerabilities({}) == ["a 1: CVE-1"]
    assert audit.crates() == [advisory]
    assert not capsys.readouterr().out
