"""`make audit`: licences and known vulnerabilities of what we need to run; what cannot be asked is said and skipped."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).parent.parent
FREE = re.compile(r"\b(0BSD|Apache|BSD|BSL-1\.0|CC0-1\.0|ISC|MIT|PSF-2\.0|Zlib)\b")
# What a build of torch for NVIDIA's devices brings; a build for CPUs does not.
OF_TORCH = re.compile(r"cuda-|nvidia-")
NOT_REACHED = re.compile(r"failed to fetch|network|resolve|timed out|connection", re.IGNORECASE)


def needed():
    """Name -> installed distribution of everything the package requires, extras apart."""
    found = {}
    pending = ["torch-to-nnef-native"]
    while pending:
        name = re.match(r"[\w.-]+", pending.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another system or Python
            continue
        pending += [line for line in found[name].requires or () if "extra ==" not in line]
    return found


def licences(found):
    """Distributions whose metadata name no licence that lets anyone use them."""

    def stated(distribution):
        about = distribution.metadata
        return " ".join(
            [about.get("License-Expression") or about.get("License") or "", *(about.get_all("Classifier") or ())]
        )

    return [
        f"{name}: no free licence"
        for name, d in found.items()
        if not FREE.search(stated(d)) and not OF_TORCH.match(name)
    ]


def vulnerabilities(found):
    """What pip-audit knows of these versions."""
    if not util.find_spec("pip_audit"):
        return skipped("pip-audit is not installed")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={d.version.split('+')[0]}\n" for name, d in found.items()))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--format", "json", "--no-deps", "--disable-pip", "-r", file.name]
        run = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(run.stdout)["dependencies"]
    except ValueError:
        return skipped(f"pip-audit came to no result: {run.stderr.strip()[-300:]}")
    return [f"{p['name']} {p['version']}: {v['id']}" for p in packages for v in p.get("vulns", ())]


def crates():
    """What cargo deny finds by `deny.toml`."""
    if not shutil.which("cargo-deny"):
        return skipped("cargo-deny is not installed")
    wrong = []
    for checks in (["bans", "licenses", "sources"], ["advisories"]):
        run = subprocess.run(["cargo", "deny", "check", *checks], capture_output=True, text=True, cwd=ROOT)
        if run.returncode and checks == ["advisories"] and NOT_REACHED.search(run.stderr):
            skipped("the database of advisories cannot be fetched")
        elif run.returncode:
            wrong.append(run.stderr)
    return wrong


def skipped(why):
    print(f"audit: skipped, {why}")
    return []


if __name__ == "__main__":
    distributions = needed()
    problems = [*licences(distributions), *vulnerabilities(distributions), *crates()]
    print("\n".join(problems) or f"audit: {len(distributions)} packages, nothing found")
    sys.exit(bool(problems))
