"""The soak: what came of each kind of request, and how large the server was before and after."""

from __future__ import annotations

from benchmarks.harness import table
from benchmarks.report import Block, Document, Lines

MIB = 2**20


def soak_rows(document: Document) -> tuple[list[str], Lines]:
    """One line per kind of request: how many, and what came."""
    lines = []
    for row in document["rows"]:
        came = ", ".join(f"{count:,} x {status}" for status, count in row["statuses"].items())
        lines.append([row["kind"], f"{row['requests']:,}", came])
    return ["kind", "sent", "what came"], lines


def soak_sizes(document: Document) -> str:
    """The server at rest, by moment."""
    keys = ("processes", "descriptors", "threads")
    lines = [
        [size["moment"], *[str(size[key]) for key in keys], f"{size['bytes'] / MIB:,.0f}"] for size in document["sizes"]
    ]
    return "The server at rest:\n\n" + table(["", *keys, "resident MiB"], lines)


def soak_verdict(document: Document) -> str:
    """Wrong answers, what was done to the server, and the schema's test."""
    faults = ", ".join(f"{name} ({count})" for name, count in document["faults"].items())
    wrong, schema = len(document["wrong_answers"]), document["schema_test"]
    failed = f"a 500 or an undocumented answer from {', '.join(schema['failed'])}" if schema["failed"] else "no fault"
    return (
        f"**{wrong} wrong or lost answers.** Done to the server meanwhile: {faults}. All "
        f"{document['different_questions']} good questions were asked alone too, before, between and at the end. The "
        f"OpenAPI surface: {schema['operations']} operations, {schema['cases']} requests drawn from their schemas, "
        f"{failed}."
    )


BLOCKS = {
    "soak": Block(
        pattern="soak_*.json",
        rows=soak_rows,
        before=soak_verdict,
        caption="{arguments[requests]} requests with faults and a quarter more without, {arguments[at_once]} at once, "
        "{arguments[mutations]} damaged files; {environment[machine]}; {model}",
        after=soak_sizes,
    ),
}
