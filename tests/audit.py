"""`make audit`: licences and known vulnerabilities of what we need to run; what cannot be asked is said and skipped.

Licences are looked at always: of what is installed, and of all crates. `pip-audit` and `cargo deny` need their databases.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

ROOT = Path(__file__).parent.parent
US = "torch-to-nnef-native"
FREE = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "HPND", "ISC", "MIT"),
    *("MIT-CMU", "MPL-2.0", "PSF-2.0", "Unicode-3.0", "Unlicense", "Zlib"),
}
# What metadata said before SPDX expressions.
FREE_NAMES = re.compile(r"\b(Apache|BSD|ISC|MIT|MPL|Mozilla Public License|Python Software Foundation)\b")
# What a build of torch for NVIDIA's devices brings; a build for CPUs does not.
OF_TORCH = re.compile(r"cuda-|nvidia-")


def is_free(expression):
    """Whether an SPDX expression lets anyone use it; exceptions (`WITH`) only add rights. `/` is an old `OR`."""
    alternatives = re.split(r" OR |/", re.sub(r" WITH [\w.-]+", "", expression))
    if "(" not in expression:
        return any(all(part.strip() in FREE for part in one.split(" AND ")) for one in alternatives)
    inner = re.sub(r"\(([^()]*)\)", lambda found: "MIT" if is_free(found[1]) else "none", expression)
    return is_free(inner)


def licence(distribution):
    """`(what its metadata says, whether that is free)`."""
    about = distribution.metadata
    if expression := about.get("License-Expression"):
        return expression, is_free(expression)
    classifiers = [name for name in about.get_all("Classifier") or () if name.startswith("License ::")]
    stated = " ".join(classifiers) or (about.get("License") or "").strip().partition("\n")[0]
    return stated, stated in FREE or bool(FREE_NAMES.search(stated))


def needed():
    """Name -> installed distribution of everything the package requires, its extras too where they are installed."""
    found = {}
    pending = [US]
    while pending:
        name = re.match(r"[\w.-]+", pending.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another system or Python, or of an extra
            continue
        pending += [line for line in found[name].requires or () if name == US or "extra ==" not in line]
    return found


def wrong_licences(found):
    """Distributions and crates that not everyone may use."""
    stated = {name: licence(d) for name, d in found.items() if not OF_TORCH.match(name)}
    host = re.search("host: (.*)", output("rustc", "-vV"))[1]
    known = output(
        "cargo", "metadata", "--format-version", "1", "--locked", "--all-features", "--filter-platform", host
    )
    for crate in json.loads(known)["packages"]:
        said = crate["license"] or ""
        stated[f"crate {crate['name']}"] = said, is_free(said)
    return [f"{name}: not free, {said or 'no licence'}" for name, (said, free) in stated.items() if not free]


def output(*command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout


def vulnerabilities(found):
    """What pip-audit knows of these versions."""
    if not util.find_spec("pip_audit"):
        return skipped("pip-audit is not installed")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={d.version.split('+')[0]}\n" for name, d in found.items() if name != US))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--format", "json", "--no-deps", "--disable-pip", "-r", file.name]
        run = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(run.stdout)["dependencies"]
    except ValueError:
        return skipped(f"pip-audit came to no result: {run.stderr.strip()[-300:]}")
    if unknown := [package["name"] for package in packages if "skip_reason" in package]:
        skipped(f"pip-audit could not ask for {len(unknown)} of {len(packages)} packages: {', '.join(unknown)}")
    return [f"{p['name']} {p['version']}: {v['id']}" for p in packages for v in p.get("vulns", ())]


def crates():
    """What cargo deny finds by `deny.toml`."""
    if not shutil.which("cargo-deny"):
        return skipped("cargo-deny is not installed")
    wrong = deny("check", "bans", "licenses", "sources")
    if deny("fetch", "db"):
        skipped("the database of crates' advisories cannot be fetched")
        return wrong
    return wrong + deny("check", "--disable-fetch", "advisories")


def deny(*arguments):
    run = subprocess.run(["cargo", "deny", *arguments], capture_output=True, text=True, cwd=ROOT)
    return [run.stderr] if run.returncode else []


def skipped(why):
    print(f"audit: skipped, {why}")
    return []


def main():
    """Prints what is wrong and what was skipped; returns whether anything is wrong."""
    distributions = needed()
    problems = [*wrong_licences(distributions), *vulnerabilities(distributions), *crates()]
    print(
        "\n".join(problems) or f"audit: {len(distributions)} packages and all crates, nothing found in what was asked"
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
