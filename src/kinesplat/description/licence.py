"""Licence of a description, read from the file beside it."""

from pathlib import Path

_NAMES = ("LICENSE*", "LICENCE*", "COPYING*")
_MARKS = [
    ("Apache-2.0", ("Apache License", "Version 2.0")),
    ("MPL-2.0", ("Mozilla Public License", "2.0")),
    ("GPL-3.0", ("GNU GENERAL PUBLIC LICENSE", "Version 3")),
    ("GPL-2.0", ("GNU GENERAL PUBLIC LICENSE", "Version 2")),
    ("LGPL", ("GNU LESSER GENERAL PUBLIC LICENSE",)),
    ("CC-BY-NC", ("NonCommercial",)),
    ("CC-BY-4.0", ("Creative Commons Attribution 4.0",)),
    ("BSD-3-Clause", ("Redistribution and use in source and binary forms", "Neither the name")),
    ("BSD-2-Clause", ("Redistribution and use in source and binary forms",)),
    ("MIT", ("Permission is hereby granted, free of charge",)),
]
_SHOWN_LINES = 4


def licence_beside(path: Path, levels: int = 4) -> str:
    """SPDX-like name and first lines of the licence file in the folder of `path` or up to `levels` folders above.

    "unknown" when there is none; the name alone is a reading aid, the file is what counts.
    """
    for folder in list(path.resolve().parents)[: levels + 1]:
        for name in _NAMES:
            for file in sorted(f for f in folder.glob(name) if f.is_file()):
                return _summary(file.read_text(errors="replace"))
    return "unknown"


def _summary(text: str) -> str:
    flat = " ".join(text.split())
    spdx = next((name for name, marks in _MARKS if all(m.lower() in flat.lower() for m in marks)), "see file")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{spdx}: {' / '.join(lines[:_SHOWN_LINES])}"
