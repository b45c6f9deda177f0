"""The tested versions of DeepSpeed and torch: the only table of them, for the verdicts at the start, `smartfrz doctor` and `--version`."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

#: By package. The backends touch private names, so a release is in it only if its cells ran; docs/versions.md says which cells.
TESTED = {
    "deepspeed": SpecifierSet(">=0.16.4,<=0.19.8,!=0.17.*,!=0.18.0,!=0.18.1,!=0.18.2,!=0.18.3,!=0.18.4,!=0.18.5"),
    "torch": SpecifierSet(">=2.13,<2.15"),
}
_NAMES = {"deepspeed": "DeepSpeed", "torch": "torch"}


def is_tested(package: str, version: str) -> bool:
    """Whether a version of a package is a tested one. A local part, such as "+cu128", does not count."""
    return TESTED[package].contains(version.split("+")[0], prereleases=True)


def untested(**installed: str) -> str | None:
    """Return in words which of the installed versions are untested; None if all are tested.

    Args:
        installed: Versions by the name of the package.
    """
    said = [
        f"{_NAMES[package]} {version} is not among the tested versions ({TESTED[package]})"
        for package, version in installed.items()
        if not is_tested(package, version)
    ]
    return ", and ".join(said) or None


def tested_range(package: str) -> str:
    """Return the tested versions of a package in words, such as "0.16.4 to 0.19.8 except 0.17.*"."""
    bounds = {spec.operator: spec.version for spec in TESTED[package] if spec.operator != "!="}
    first, last, after = (bounds.get(operator) for operator in (">=", "<=", "<"))
    words = f"{first} to {last}" if last is not None else f"{first} or later, before {after}"
    if without := sorted(spec.version for spec in TESTED[package] if spec.operator == "!="):
        words += f" except {', '.join(without)}"
    return f"{_NAMES[package]} {words}"
