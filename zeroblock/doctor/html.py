"""The report as one page: report.html with the diagnosis in it. Nothing is loaded from anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .explain import REFERENCES
from .kinds import KINDS, finite
from .text import savings_lines

if TYPE_CHECKING:
    from .diagnosis import Diagnosis

TEMPLATE = Path(__file__).with_name("report.html")


def page(d: Diagnosis) -> str:
    """The HTML of the page."""
    data = {
        **d.to_dict(),
        "verdict": d.verdict,
        "kinds": KINDS,
        "savings_lines": savings_lines(d),
        "references": REFERENCES,
    }
    # "<" may not appear: a parameter or model could be named "</script>".
    text = json.dumps(finite(data), allow_nan=False).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text, 1)
