"""Unpaired: label files that belong to no image, each with the reason where a file beside the images tells one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from paceline.data.findings import Finding
from paceline.data.headers import IMAGE_SUFFIXES
from paceline.data.scan import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_NO_LABELS = frozenset({"classes.txt", "notes.txt", "readme.txt"})
"""Text files, in lower case, that annotation tools put beside labels."""
_OTHER_SUFFIXES = frozenset(
    {".avif", ".cr2", ".dng", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".ppm", ".psd", ".svg", ".tga"}
)
"""Endings, in lower case, of images that are not read."""


def unpaired_labels(labels: Iterable[str], folders: Mapping[str, Iterable[str]], root: str) -> list[Finding]:
    """Find out why `labels` have no image, in the order of their paths.

    `folders` leads from each folder of labels to the folders of images that it serves; no other one is looked into.
    """
    beside: dict[str, dict[str, list[str]]] = {}
    findings = []
    for label in sorted(labels):
        folder, name = os.path.split(label)
        if name.lower() in _NO_LABELS:
            continue
        if folder not in beside:
            beside[folder] = _by_stem(folders.get(folder, ()))
        stem = os.path.splitext(name)[0]
        message = next(filter(None, (_reason(path, label) for path in beside[folder].get(stem.lower(), ()))), None)
        message = message or "no image has its name; add the image, or remove the file"
        findings.append(Finding(kind="unpaired", file=shown(label, root), line=0, message=message))
    return findings


def _by_stem(folders: Iterable[str]) -> dict[str, list[str]]:
    """List the files of folders by their names without ending, in lower case."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        try:
            names = sorted(os.listdir(folder))
        except OSError:  # gone since it was walked
            continue
        for name in names:
            found.setdefault(os.path.splitext(name)[0].lower(), []).append(os.path.join(folder, name))
    return found


def _reason(path: str, label: str) -> str:
    """Say why a file of about the same name is not the image of a label; empty where it never was meant to be."""
    name, (stem, ending) = os.path.basename(path), os.path.splitext(os.path.basename(label))
    own, suffix = os.path.splitext(name)
    known, other = suffix.lower() in IMAGE_SUFFIXES, suffix.lower() in _OTHER_SUFFIXES
    if not (known or other):
        return ""
    if own != stem:
        if os.path.exists(os.path.join(os.path.dirname(label), own + ending)):
            return ""  # it has a label of its own
        return f"the image is called {name}; write both names in the same letters"
    if not os.path.exists(path):
        return f"its image {name} is a link to nothing; restore what it points at, or remove both"
    if other:
        return f"its image {name} is of a type that is not read; convert it to JPEG or PNG"
    return f"its image {name} is no file; put the image there"
