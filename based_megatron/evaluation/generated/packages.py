"""What this machine knows of its packages: METADATA of Python distributions, and Debian's list where there is one."""

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

DPKG_STATUS = Path("/var/lib/dpkg/status")
LONGEST_FIELD = 200
"""Characters of a field that is shown."""


@dataclass(frozen=True)
class Package:
    """A package with its one-line fields and its description."""

    name: str
    fields: Mapping[str, str]
    description: str


PYTHON_FIELDS = (
    "Version", "Summary", "Home-page", "Author", "Author-email", "Maintainer", "License", "License-Expression", "Keywords",
    "Requires-Python",
)  # fmt: skip
DEBIAN_FIELDS = ("Version", "Section", "Maintainer", "Homepage", "Installed-Size", "Source", "Architecture")


def python_packages() -> list[Package]:
    """Installed distributions, each once, by name."""
    found = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        name = metadata["Name"] if metadata else None
        if name and name not in found:
            values = {field: metadata[field] for field in PYTHON_FIELDS if field in metadata}
            body = metadata["Description"] if "Description" in metadata else metadata.get_payload()  # type: ignore[attr-defined]
            found[name] = Package(name, _shown(values), str(body or "").strip())
    return [found[name] for name in sorted(found)]


def debian_packages(status: Path = DPKG_STATUS) -> list[Package]:
    """Packages that dpkg has installed, by name; none on other systems."""
    try:
        text = status.read_text(errors="replace")
    except OSError:
        return []
    found = {}
    for stanza in re.split(r"\n\n+", text):
        message = message_from_string(stanza)
        if name := message["Package"]:
            values = {field: message[field] for field in DEBIAN_FIELDS if field in message}
            found[name] = Package(name, _shown(values), " ".join(str(message["Description"] or "").split()))
    return [found[name] for name in sorted(found)]


def _shown(values: Mapping[str, str]) -> dict[str, str]:
    """Fields of one line, which are not too long; packages write UNKNOWN where they say nothing."""
    stripped = {field: str(value).strip() for field, value in values.items()}
    return {
        field: value
        for field, value in stripped.items()
        if value and value != "UNKNOWN" and "\n" not in value and len(value) <= LONGEST_FIELD
    }
