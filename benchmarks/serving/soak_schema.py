"""The OpenAPI surface of a running server, tried by schemathesis."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance"
# The others are vLLM's.
OURS = frozenset({"POST /v1/chat/completions", "POST /tokenize"})


def try_schema(url: str, examples: int, log: Path) -> dict[str, Any]:
    """Schemathesis over every documented operation; its report goes to a file."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS]
    command += ["--max-examples", str(examples), "--phases", "examples,fuzzing", "--workers", "8", "--seed", "0"]
    command += ["--continue-on-failure", "--request-timeout", "300", "--no-color"]
    # Answers 501 by design: no model here has what it is for.
    command += ["--exclude-path", "/v1/systemone"]
    with log.open("wb") as sink:
        code = subprocess.run(command, stdout=sink, stderr=subprocess.STDOUT, cwd=log.parent).returncode
    text = log.read_text(errors="replace")
    print(text[-3000:])
    failed = sorted(set(re.findall(r"^_{3,} ([A-Z]+ /\S*) _{3,}$", text, re.MULTILINE)))
    if code and not failed:
        sys.exit(f"schemathesis ended with {code}; see {log}")
    (cases,) = re.findall(r"^  (\d+) generated", text, re.MULTILINE)
    (operations,) = re.findall(r"^  Tested: (\d+)", text, re.MULTILINE)
    return {"cases": int(cases), "operations": int(operations), "failed": failed}
