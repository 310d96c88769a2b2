"""The example in docs/howto/embed.md does what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "embed.md"


def test_the_example_prints_what_the_page_says(tmp_path: Path) -> None:
    text = PAGE.read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    wanted = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0]
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.stderr == ""
    assert ran.stdout == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.raw"]
